"""What a dense student is on disk: its config.json, its tensors, and whether it computes what was meant."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetools.architectures.building import effective_config
from moetools.architectures.dense import both_spellings, with_layers
from moetools.architectures.weights import LayerWeights, WideExpert
from moetools.errors import UnsupportedModelError, VerificationError
from moetools.forward.streaming import StreamedModel
from moetools.passes.student_streams import StudentLayer
from moetools.text.tokens import TokenBatch

_FFN = "mlp"
_TOLERANCE = 2e-3


@dataclass(frozen=True, kw_only=True)
class StudentPlan:
    """What kind of model the student becomes.

    Attributes:
        config: its config.json.
        dense: a dense model; else a MoE model with one expert, for families without a dense counterpart.
        layers: the teacher's layers it keeps.
        width: of its FFN.
    """

    config: Mapping[str, Any]
    dense: bool
    layers: Sequence[int]
    width: int

    @property
    def warning(self) -> str | None:
        """What a user should know who expected a dense model."""
        if self.dense:
            return None
        return (
            f"no dense family computes what {self.config['model_type']} computes outside its experts: "
            "the student is a MoE model with one expert per layer"
        )


def plan_student(teacher: StreamedModel, layers: Sequence[int], width: int | None) -> StudentPlan:
    """The student of a teacher; no weight is read.

    Raises:
        UnsupportedModelError: the family has no dense counterpart, and a router of a single expert in every layer
            cannot stand for it.
    """
    width = width or active_width(teacher)
    arch, config = teacher.arch, teacher.config
    if arch.dense is not None:
        known = arch.dense.model_type
        effective = {} if known is None else effective_config(config, teacher.checkpoint.path, known)
        dense = arch.dense.config(config, effective, width=width, layers=layers)
        return StudentPlan(config=both_spellings(dense), dense=True, layers=layers, width=width)
    some_dense = len(teacher.stock.moe_layers) < teacher.num_layers
    if arch.min_experts_per_group > 1 or shared_width(teacher) or some_dense:
        raise UnsupportedModelError(
            f"model_type '{arch.model_type}' has no dense counterpart, and one expert per layer cannot replace it",
            hint="moetools merge-experts makes it smaller",
        )
    single = with_layers(arch.with_expert_count(config, 1), layers)
    present = [key for key in arch.width_keys if key in config]
    single[(present or list(arch.width_keys))[0]] = width
    return StudentPlan(config=single, dense=False, layers=layers, width=width)


def active_width(teacher: StreamedModel) -> int:
    """Neurons a token uses in one layer of the teacher: K * F and those of the shared experts."""
    shape = teacher.layer_shape(1)
    return shape.top_k * shape.expert_size + shared_width(teacher)


def shared_width(teacher: StreamedModel) -> int:
    """Neurons of the shared experts of one layer."""
    index, moe = next(iter(teacher.stock.moe_layers.items()))
    block = teacher.stock.layer(index).get_submodule(moe.block)
    names = {name: tensor for name, tensor in block.named_parameters() if name.endswith("down_proj.weight")}
    return sum(tensor.shape[1] for name, tensor in names.items() if "shared" in name)


class StudentTensors:
    """The tensors of the student's layers, under the names of the module and of the files.

    Args:
        student: the teacher's checkpoint with the student's config.
    """

    def __init__(self, teacher: StreamedModel, student: StreamedModel, plan: StudentPlan, block: str) -> None:
        self.teacher, self.student, self.plan, self._block = teacher, student, plan, block

    def dtype(self, layer: StudentLayer) -> torch.dtype:
        """Of the new FFN: that of the teacher's experts."""
        if layer.weights is not None:
            return layer.weights.down_EDF.dtype
        return layer.native[f"{self._block}.down_proj.weight"].dtype

    def place(self, layer: StudentLayer) -> int:
        """The layer's index in the student."""
        return list(self.plan.layers).index(layer.index)

    def in_module(self, layer: StudentLayer, ffn: WideExpert) -> dict[str, Tensor]:
        """By name inside the student's layer."""
        if not self.plan.dense:
            return self.teacher.stock.with_weights(layer.index, layer.native, _single_expert(layer, ffn))
        beside = {name: one for name, one in layer.native.items() if not name.startswith(f"{self._block}.")}
        return {**beside, **_projections(f"{_FFN}.", ffn, self.dtype(layer))}

    def on_disk(self, layer: StudentLayer, ffn: WideExpert) -> dict[str, Tensor]:
        """By name in the files; what does not belong to the FFN comes from the teacher byte for byte."""
        stock, place = self.teacher.stock, self.place(layer)
        if not self.plan.dense:
            tensors = stock.disk_tensors(layer.index, layer.native, _single_expert(layer, ffn))
            return {_renumbered(name, layer.index, place): tensor for name, tensor in tensors.items()}
        beside = self.teacher.checkpoint.read(stock.names_beside(layer.index, layer.native, self._block))
        moved = {_renumbered(name, layer.index, place): tensor for name, tensor in beside.items()}
        before, number, _ = next(iter(moved)).partition(f".{place}.")
        return {**moved, **_projections(f"{before}{number}{_FFN}.", ffn, self.dtype(layer))}


def check_equivalent(
    student_logits: Tensor, streamed_logits: Tensor, batch: TokenBatch, dtype: torch.dtype, model_type: str
) -> None:
    """Stock code of the student's family computes what the teacher's layers with the new FFNs compute.

    Raises:
        VerificationError: it does not; the two families differ in more than the FFN.
    """
    real = slice(None) if batch.attention_mask is None else batch.attention_mask
    scale = streamed_logits[real].abs().max().item()
    difference = (student_logits[real].float() - streamed_logits[real].float()).abs().max().item()
    if difference > _TOLERANCE * scale * (1 if dtype == torch.float32 else 50):
        raise VerificationError(
            f"'{model_type}' does not compute what the teacher's layers compute with the same FFN: logits differ by "
            f"{difference:.3g} of {scale:.3g}",
            hint="please report this as a bug of moetools",
        )


def _single_expert(layer: StudentLayer, ffn: WideExpert) -> LayerWeights:
    """The FFN as the only expert of a MoE layer, in the layer's own dtypes; its router row says nothing."""
    weights = layer.weights
    assert weights is not None, "plan_student refuses dense layers here"

    def one(tensor: Tensor | None, like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        zeros = like.new_zeros((*like.shape[1:-1], ffn.width)) if tensor is None else tensor
        return zeros[None].to(like.dtype)

    up, down = one(ffn.up_WD, weights.up_EFD), one(ffn.down_DW, weights.down_EDF)
    assert up is not None
    assert down is not None
    bias = weights.down_bias_ED
    if bias is not None:
        bias = bias.new_zeros(1, bias.shape[1]) if ffn.down_bias_D is None else ffn.down_bias_D[None].to(bias.dtype)
    return LayerWeights(
        up_EFD=up,
        down_EDF=down,
        gate_EFD=one(ffn.gate_WD, weights.gate_EFD),
        gate_bias_EF=one(ffn.gate_bias_W, weights.gate_bias_EF),
        up_bias_EF=one(ffn.up_bias_W, weights.up_bias_EF),
        down_bias_ED=bias,
        **{
            name: torch.zeros_like(tensor[:1])
            for name, tensor in weights.tensors().items()
            if name in LayerWeights.ROUTER_FIELDS
        },
    )


def _projections(prefix: str, ffn: WideExpert, dtype: torch.dtype) -> dict[str, Tensor]:
    assert ffn.gate_WD is not None, "dense families have gated FFNs"
    tensors = {"gate_proj": ffn.gate_WD, "up_proj": ffn.up_WD, "down_proj": ffn.down_DW}
    return {f"{prefix}{name}.weight": tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def _renumbered(name: str, index: int, place: int) -> str:
    """A name on disk with the layer's number, which comes first, replaced."""
    return name.replace(f".{index}.", f".{place}.", 1)
