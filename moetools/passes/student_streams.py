"""Distill layer after layer: the teacher's hidden states and the student's side by side.

Where the student has fewer layers, its FFN should add what leads to the teacher's hidden states behind the last layer
before the next one that is kept.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moetools.architectures.weights import LayerWeights, WideExpert, join_experts, stack_experts
from moetools.errors import UnsupportedModelError
from moetools.forward.memory import MemoryPlan
from moetools.forward.streaming import LoadedLayer, StreamedModel
from moetools.methods.base import LayerSample
from moetools.methods.joint_refit import RefitBounds
from moetools.passes.layer_equations import (
    Activate,
    family_activation,
    intermediate,
)
from moetools.passes.layer_features import LayerFeatures, Routes
from moetools.passes.stored import NOTHING_STORED, ReplayedLayer, Stored
from moetools.passes.two_streams import KeepingObserver, Split, TwoStreams, residual_scale
from moetools.statistics.base import State
from moetools.text.tokens import TokenBatch, TokenData

SAMPLE_TOKENS = 2048
"""Inputs of a layer that an initialisation looks at, about."""
_LINEAR_TOLERANCE = 1e-3
LOCAL_TOKENS = 65536
"""That local steps look at, about; how much memory there is does not decide about weights."""


class StudentLayer:
    """A layer the student keeps, between its measurement and `finish`.

    Attributes:
        index: of the teacher's layer.
        native: the teacher's fused tensors in the dtype on disk.
        weights: its routed experts; None where the teacher's layer is dense.
        fixed: neurons that every token uses: the shared experts, or the teacher's own dense FFN; None without any.
        statistics: finalized, measured on the student's stream.
        sample: some of the FFN's inputs; its logits are the teacher's router's.
    """

    def __init__(self, streams: "StudentStreams", layer: LoadedLayer, statistics: dict[str, State]) -> None:
        assert layer.native is not None
        self._streams, self.index, self.native = streams, layer.index, layer.native
        self.statistics = statistics
        moe = layer.index in streams.original.stock.moe_layers
        self.weights: LayerWeights | None = streams.original.weights(layer) if moe else None
        self.fixed = streams.fixed_neurons(self.native, self.weights)
        self.activate = streams.activation
        self.sample: LayerSample | None = None

    def inputs_and_targets(self, held: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs [T, D], what the FFN should add [T, D]) of the tokens that are (not) held out, batch by batch."""
        return self._streams.inputs_and_targets(held)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of tokens that are not held out, [T, D] each; of many, those of evenly spaced batches."""
        streams = self._streams
        numbers = streams.some(max(1, -(-streams.data.num_tokens // LOCAL_TOKENS)))
        inputs, targets = zip(*streams.inputs_and_targets(False, numbers), strict=True)
        return torch.cat(inputs), torch.cat(targets)

    def features(self, ffn: WideExpert, *, every: int = 1) -> LayerFeatures:
        """The least-squares problem of the FFN's down projection. `every` > 1 uses only every so many batches."""
        streams, device = self._streams, self._streams.original.device
        numbers = streams.some(every)
        routes = {number: Routes.everywhere(streams.batches[number].input_ids.numel(), device) for number in numbers}
        return LayerFeatures(streams, routes, [ffn], self.activate, nbytes=streams.feature_bytes)

    @property
    def bounds(self) -> RefitBounds:
        """What solving it may take."""
        return self._streams.bounds

    def finish(self, ffn: WideExpert) -> None:
        """Run the student's stream through the layer with its new FFN."""
        self._streams.finish(ffn)


class StudentStreams(TwoStreams):
    """Streams teacher and student side by side.

    Args:
        kept: the teacher's layers that the student has, ascending.
        names: statistics to measure on the student's stream in front of every new FFN.
        plan: see `streams_plan`.
        stored: layers of the student that are finished already.
    """

    def __init__(
        self,
        teacher: StreamedModel,
        data: TokenData,
        kept: Sequence[int],
        names: Sequence[str],
        plan: MemoryPlan,
        stored: Stored = NOTHING_STORED,
    ) -> None:
        super().__init__(teacher, data, names, plan, sample_tokens=SAMPLE_TOKENS)
        self.kept, self._stored = list(kept), stored
        index, moe = next(iter(teacher.stock.moe_layers.items()))
        self.block = moe.block
        self.activation: Activate = family_activation(
            teacher.stock.layer(index).get_submodule(f"{moe.block}.{teacher.arch.experts}")
        )

    def layers(self) -> Iterator[StudentLayer | ReplayedLayer]:
        """Every kept layer in order; `finish` must be called on a `StudentLayer` before the next one is asked for."""
        pending: StudentLayer | ReplayedLayer | None = None
        for layer in self.walk("fitting"):
            if layer.index not in self.kept:
                self.drop(layer)
                continue
            if pending is None:
                self._refuse_normed(layer)
            else:
                yield pending
            place = self.kept.index(layer.index)
            tensors = self._stored.get(place)
            pending = self._measured(layer) if tensors is None else self._replayed(layer, place, tensors)
        if pending is not None:
            yield pending

    def last_hidden(self, number: int) -> Tensor:
        """The student's hidden states behind its last layer, [B, N, D]; once all layers are finished."""
        return self.after[number]

    def _measured(self, layer: LoadedLayer) -> StudentLayer:
        states, sample = self.measure(layer)
        finalized = {name: statistic.finalize(states[name]) for name, statistic in self.statistics.items()}
        found = StudentLayer(self, layer, finalized)
        if found.weights is not None:
            hidden_ND, logits_NE = sample.result()
            found.sample = LayerSample(
                hidden_ND=hidden_ND, logits_NE=logits_NE, activate=self.activation, route=_never_routed
            )
        return found

    def _replayed(self, layer: LoadedLayer, place: int, tensors: Mapping[str, Tensor]) -> ReplayedLayer:
        self.repeat(layer)
        self.finish(self._stored_ffn(layer.index, tensors))
        return ReplayedLayer(index=place, tensors=tensors)

    def _stored_ffn(self, index: int, tensors: Mapping[str, Tensor]) -> WideExpert:
        """The FFN of a student's layer: a dense one, or the only expert of a family without dense models."""
        if f"{self.block}.{self.original.arch.experts}.down_proj" in tensors:
            return stack_experts(self.original.stock.weights(index, tensors), (0,))
        (down,) = (name for name in tensors if name.endswith("down_proj.weight"))
        return _dense_neurons(tensors, down.removesuffix("down_proj.weight"))

    def split(self, layer: LoadedLayer, batch: TokenBatch, hidden: Tensor, seen: KeepingObserver) -> Split:  # noqa: ARG002
        with _no_output(layer.module.get_submodule(self.block)) as ffn:
            without = self.original.run_layer(layer, batch, hidden)
        return Split(inputs=ffn.input, without=without, behind=None)

    def _refuse_normed(self, layer: LoadedLayer) -> None:
        """A layer adds its FFN's output to the residual stream as it is, or the target of the fit would be wrong."""
        batch, hidden = self.batches[0], self.current(0)
        with _no_output(layer.module.get_submodule(self.block)) as ffn:
            without = self.original.run_layer(layer, batch, hidden)
        behind = self.original.run_layer(layer, batch, hidden)
        difference = (behind - without - residual_scale(layer) * ffn.output).abs().max()
        if difference > _LINEAR_TOLERANCE * behind.abs().max() and self.original.dtype == torch.float32:
            raise UnsupportedModelError(
                f"model_type '{self.original.arch.model_type}' changes its FFN's output before adding it",
                hint="distillation to dense handles families that add the FFN's output to the residual stream",
            )

    def inputs_and_targets(self, held: bool, numbers: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(len(self.batches)) if numbers is None else numbers:
            rows_T, hidden_TD = self.rows(number, held), self.inputs[number].flatten(0, 1).to(self.original.device)
            yield hidden_TD[rows_T].float(), self.wanted(number)[rows_T]

    def fixed_neurons(self, native: dict[str, Tensor], weights: LayerWeights | None) -> WideExpert | None:
        """The FFN of a dense layer, or all shared experts of a MoE layer, as one FFN."""
        block = {name.removeprefix(f"{self.block}."): tensor for name, tensor in native.items()}
        prefixes = [""] if weights is None else _shared_prefixes(block)
        parts = [_dense_neurons(block, prefix) for prefix in prefixes]
        return join_experts(parts) if parts else None

    def finish(self, ffn: WideExpert) -> None:
        ffn = _row_major(ffn)
        for number in range(len(self.batches)):
            hidden_TD = self.inputs[number].flatten(0, 1).to(self.original.device)
            self.add(number, ffn_output(ffn, hidden_TD, self.activation))


def ffn_output(ffn: WideExpert, hidden_TD: Tensor, activate: Activate) -> Tensor:
    """down @ act(gate x, up x) + bias, [T, D] fp32."""
    return nn.functional.linear(intermediate(ffn, hidden_TD, activate), ffn.down_DW, ffn.down_bias_D)


def _row_major(ffn: WideExpert) -> WideExpert:
    """Laid out as a loader has it: the last bits of a product depend on that."""
    tensors = {name: tensor for name, tensor in ffn.__dict__.items() if tensor is not None}
    return replace(ffn, **{name: tensor.contiguous() for name, tensor in tensors.items()})


def _shared_prefixes(block: dict[str, Tensor]) -> list[str]:
    names = [name for name in block if name.endswith("down_proj.weight") and "shared" in name]
    return [name.removesuffix("down_proj.weight") for name in names]


def _dense_neurons(block: Mapping[str, Tensor], prefix: str) -> WideExpert:
    gate = block.get(f"{prefix}gate_proj.weight")
    return WideExpert(
        up_WD=block[f"{prefix}up_proj.weight"].float(),
        down_DW=block[f"{prefix}down_proj.weight"].float(),
        gate_WD=None if gate is None else gate.float(),
    )


def _never_routed(_logits_NC: Tensor, _kept_C: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("an initialisation of a dense FFN routes nothing")


class _Seen:
    """Input and output of the last call of an FFN, [B, N, D]."""

    input: Tensor
    output: Tensor


@contextlib.contextmanager
def _no_output(block: nn.Module) -> Iterator[_Seen]:
    """Let the FFN compute, but add nothing."""
    seen = _Seen()

    def note(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        shape = args[0].shape
        seen.input, seen.output = args[0], first.view(shape)
        nothing = torch.zeros_like(first)
        return (nothing, *output[1:]) if isinstance(output, tuple) else nothing

    handle = block.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
