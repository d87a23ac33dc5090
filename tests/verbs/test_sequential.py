"""The two-stream pass against a model run whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.checkpoint.reader import open_checkpoint
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.forward.tokens import TokenBatch, TokenData
from moetools.verbs.layer_reduction import _wide
from moetools.verbs.sequential import SequentialLayer, SequentialPass

FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "minimax_m2", "ernie4_5_moe"]


def tokens(padded: bool = False) -> TokenData:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for number in range(3):
        mask = None
        if padded and number == 1:
            mask = torch.ones(4, 10, dtype=torch.bool)
            mask[2, 6:] = False
        ids = torch.randint(2, 128, (4, 10), generator=generator)
        batches.append(TokenBatch(input_ids=ids, attention_mask=mask, task=torch.zeros(4, dtype=torch.int64)))
    return TokenData(tasks=("t",), batches=tuple(batches), fingerprint="x", seq_len=10)


def models(path: Path, keep: int = 8) -> tuple[StreamedModel, StreamedModel]:
    options = ForwardOptions(device="cpu")
    checkpoint = open_checkpoint(path)
    original = StreamedModel(checkpoint, options)
    config = original.arch.with_expert_count(checkpoint.config, keep)
    return original, StreamedModel(checkpoint, options, config=config)


def streams(path: Path, data: TokenData, change: Callable[[SequentialLayer], LayerWeights]) -> SequentialPass:
    original, smaller = models(path)
    run = SequentialPass(original, smaller, data, ())
    with torch.inference_mode():
        for layer in run.layers():
            if isinstance(layer, SequentialLayer):
                layer.finish(change(layer))
    return run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_unchanged_weights_keep_both_streams_together(family: str, padded: bool, tiny: Callable[..., Path]) -> None:
    data = tokens(padded)
    run = streams(tiny(family), data, lambda layer: layer.weights)
    for number, batch in enumerate(data.batches):
        real = slice(None) if batch.attention_mask is None else batch.attention_mask
        assert torch.allclose(run._before[number][real], run._after[number][real], atol=1e-4)


def test_the_compressed_stream_is_the_compressed_model(tiny: Callable[..., Path]) -> None:
    """Zeroed down projections: the block adds nothing, which can be computed without the pass."""
    data, path = tokens(), tiny("mixtral")

    def zeroed(layer: SequentialLayer) -> LayerWeights:
        weights = layer.weights
        return LayerWeights(**{**weights.tensors(), "down_EDF": torch.zeros_like(weights.down_EDF)})

    run = streams(path, data, zeroed)
    model = StreamedModel(open_checkpoint(path), ForwardOptions(device="cpu"))
    with torch.inference_mode():
        hidden = model.skeleton.enter(data.batches[0])[0]
        for layer in model.layers():
            layer.module.mlp.experts.down_proj.zero_()
            hidden = model.run_layer(layer, data.batches[0], hidden)
    assert torch.allclose(hidden, run._after[0], atol=1e-5)


def dense_features(layer: SequentialLayer, hidden_TD: Tensor, model: StreamedModel) -> tuple[Tensor, Tensor]:
    """[T, E * F] gated intermediates and [T, E] routing weights of a Mixtral layer, without any of our code."""
    weights = layer.weights
    probability = (hidden_TD @ weights.router_ED.float().T).softmax(1)
    value, index = probability.topk(2)
    gates = torch.zeros_like(probability).scatter_(1, index, value / value.sum(1, keepdim=True))
    assert weights.gate_EFD is not None
    gate = torch.einsum("td,efd->tef", hidden_TD, weights.gate_EFD.float())
    up = torch.einsum("td,efd->tef", hidden_TD, weights.up_EFD.float())
    return (gates[:, :, None] * torch.nn.functional.silu(gate) * up).flatten(1), gates


def test_normal_equations_equal_the_dense_product(tiny: Callable[..., Path]) -> None:
    data = tokens(padded=True)
    original, smaller = models(tiny("mixtral"))
    run = SequentialPass(original, smaller, data, ())
    with torch.inference_mode():
        for layer in run.layers():
            assert isinstance(layer, SequentialLayer)
            experts = [_wide(layer.weights, (expert,)) for expert in range(8)]
            train, held = layer.normal_equations(experts, layer.weights)
            both = train.plus(held)
            masks = [
                torch.ones(40, dtype=torch.bool) if b.attention_mask is None else b.attention_mask.view(-1)
                for b in data.batches
            ]
            hidden = torch.cat([run._inputs[i].flatten(0, 1)[mask] for i, mask in enumerate(masks)])
            wanted = torch.cat(
                [(run._before[i] - run._unrouted[i]).flatten(0, 1)[mask] for i, mask in enumerate(masks)]
            )
            features, _ = dense_features(layer, hidden, original)
            assert torch.allclose(both.gram_NN, features.T @ features, atol=1e-3, rtol=1e-3)
            assert torch.allclose(both.cross_ND, features.T @ wanted, atol=1e-3, rtol=1e-3)
            assert both.energy == pytest.approx(wanted.square().sum().item(), rel=1e-4)
            assert held.energy > 0
            layer.finish(layer.weights)


def test_spilled_streams_give_the_same_result(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data, path = tokens(), tiny("qwen2_moe")

    def halved(layer: SequentialLayer) -> LayerWeights:
        return LayerWeights(**{**layer.weights.tensors(), "down_EDF": layer.weights.down_EDF / 2})

    kept = streams(path, data, halved)
    monkeypatch.setattr("moetools.forward.memory.MemoryPlan.activation_budget", property(lambda _: 0))
    spilled = streams(path, data, halved)
    assert spilled._after.spilled
    assert not kept._after.spilled
    for number in range(len(data.batches)):
        assert torch.equal(kept._after[number], spilled._after[number])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_a_blocked_refit_approaches_the_joint_one(family: str, tiny: Callable[..., Path]) -> None:
    """Many sweeps of block coordinate descent reach nearly the joint optimum, and no sweep makes the layer worse."""
    data = tokens(padded=True)
    original, smaller = models(tiny(family), keep=4)
    run = SequentialPass(original, smaller, data, ())
    with torch.inference_mode():
        for layer in run.layers():
            assert isinstance(layer, SequentialLayer)
            kept = layer.weights.select(torch.arange(4))
            experts = [_wide(kept, (expert,)) for expert in range(4)]
            once, facts = layer.refit_one_by_one(experts, kept, sweeps=1)
            assert facts["held_out_after"] <= facts["held_out_before"] + 1e-6
            train, held = layer.normal_equations(experts, kept)
            start = torch.cat([expert.down_DW.T for expert in experts])
            if kept.down_bias_ED is None:  # else the two count the fixed bias in different places
                assert held.error(start.double()) / held.energy == pytest.approx(facts["held_out_before"], rel=1e-2)
            both = train.plus(held)
            errors = [
                both.error(torch.cat([expert.down_DW.T for expert in found]).double()) for found in (experts, once)
            ]
            assert errors[1] < errors[0]
            layer.finish(kept)


def test_with_one_expert_per_token_blocked_is_joint(tiny: Callable[..., Path]) -> None:
    """No token is shared, so the Gram is block-diagonal and one sweep solves it (ridges differ per block only)."""
    data = tokens()
    original, smaller = models(tiny("mixtral", num_experts_per_tok=1), keep=4)
    run = SequentialPass(original, smaller, data, ())
    with torch.inference_mode():
        for layer in run.layers():
            assert isinstance(layer, SequentialLayer)
            kept = layer.weights.select(torch.arange(4))
            experts = [_wide(kept, (expert,)) for expert in range(4)]
            train, _ = layer.normal_equations(experts, kept)
            width = experts[0].width
            blocks = torch.block_diag(
                *(train.gram_NN[i : i + width, i : i + width] for i in range(0, 4 * width, width))
            )
            assert torch.equal(train.gram_NN, blocks)
            layer.refit_one_by_one(experts, kept)
            layer.finish(kept)
