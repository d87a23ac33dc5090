"""Canonical layer weights against hand-written indexing, for every way experts are stored."""

from dataclasses import replace

import pytest
import torch

from moetools.architectures.base import Architecture
from moetools.architectures.weights import ExpertsLayout, LayerWeights, extract, insert

E, F, D = 4, 3, 5
ARCH = Architecture(model_type="toy", router_bias="gate.bias", correction_bias="gate.correction")
LAYOUTS = [
    ExpertsLayout(transposed=transposed, interleaved=interleaved, gated=gated)
    for transposed in (False, True)
    for interleaved in (False, True)
    for gated in (False, True)
    if gated or not interleaved
]


def weights_of(layout: ExpertsLayout, *, biases: bool) -> LayerWeights:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return LayerWeights(
        gate_EFD=random(E, F, D) if layout.gated else None,
        up_EFD=random(E, F, D),
        down_EDF=random(E, D, F),
        gate_bias_EF=random(E, F) if biases and layout.gated else None,
        up_bias_EF=random(E, F) if biases else None,
        down_bias_ED=random(E, D) if biases else None,
        router_ED=random(E, D),
        router_bias_E=random(E) if biases else None,
        correction_bias_E=random(E) if biases else None,
    )


def stored_by_hand(weights: LayerWeights, layout: ExpertsLayout) -> dict[str, torch.Tensor]:
    """The block's tensors, written element by element."""
    rows = 2 * F if layout.gated else F
    name = "gate_up_proj" if layout.gated else "up_proj"
    fused, bias = torch.zeros(E, rows, D).double(), torch.zeros(E, rows).double()
    down = torch.zeros(E, D, F).double()
    for e in range(E):
        down[e] = weights.down_EDF[e]
        for f in range(F):
            up_row = f if not layout.gated else 2 * f + 1 if layout.interleaved else F + f
            gate_row = 2 * f if layout.interleaved else f
            fused[e, up_row] = weights.up_EFD[e, f]
            if weights.up_bias_EF is not None:
                bias[e, up_row] = weights.up_bias_EF[e, f]
            if layout.gated:
                fused[e, gate_row] = weights.gate_EFD[e, f]
                if weights.gate_bias_EF is not None:
                    bias[e, gate_row] = weights.gate_bias_EF[e, f]
    if layout.transposed:
        fused, down = fused.permute(0, 2, 1).contiguous(), down.permute(0, 2, 1).contiguous()
    block = {f"experts.{name}": fused, "experts.down_proj": down, "gate.weight": weights.router_ED}
    if weights.up_bias_EF is not None:
        block |= {f"experts.{name}_bias": bias, "experts.down_proj_bias": weights.down_bias_ED}
        block |= {"gate.bias": weights.router_bias_E, "gate.correction": weights.correction_bias_E[None]}
    return block


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.shape == right[name].shape, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_extract_and_insert(layout, biases):
    weights = weights_of(layout, biases=biases)
    block = stored_by_hand(weights, layout)
    equal(extract(ARCH, block, layout).tensors(), weights.tensors())
    inserted = insert(ARCH, weights, block, layout)
    equal(inserted, block)
    assert all(tensor.is_contiguous() for tensor in inserted.values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_smaller_layer_keeps_the_form(layout):
    """Also the leading dimension of a [1, E] correction bias."""
    weights = weights_of(layout, biases=True)
    block = stored_by_hand(weights, layout)
    smaller = insert(ARCH, weights.select(torch.tensor([3, 0])), block, layout)
    for name, tensor in block.items():
        dim = 1 if name == "gate.correction" else 0
        assert torch.equal(smaller[name], tensor.index_select(dim, torch.tensor([3, 0]))), name


def test_select_copies():
    weights = weights_of(ExpertsLayout(), biases=True)
    chosen = weights.select(torch.tensor([1, 2]))
    assert chosen.num_experts == 2
    chosen.router_ED.zero_()
    chosen.up_EFD.zero_()
    equal(weights.tensors(), weights_of(ExpertsLayout(), biases=True).tensors())


def test_tensors_lists_what_is_there():
    bare = replace(weights_of(ExpertsLayout(), biases=False), gate_EFD=None)
    assert set(bare.tensors()) == {"up_EFD", "down_EDF", "router_ED"}
