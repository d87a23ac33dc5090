"""Distill layer after layer: the teacher's hidden states and the student's side by side, as in `passes.sequential`.

Their difference R = h_teacher - (h_student without its FFN) is what the FFN of the student's layer should add, so later
layers repair what earlier ones lost. Where the student has fewer layers, h_teacher is taken behind the last teacher
layer before the next one that is kept.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moetools.architectures.weights import LayerWeights, WideExpert, join_experts, stack_experts
from moetools.errors import UnsupportedModelError
from moetools.forward.activations import Activations
from moetools.forward.calibrate import load_statistic
from moetools.forward.streaming import LayerObserver, LoadedLayer, StreamedModel
from moetools.methods.base import LayerSample
from moetools.methods.refit import NormalEquations
from moetools.passes.layer_equations import (
    Activate,
    EquationSums,
    Slots,
    chosen_rows,
    family_activation,
    intermediate,
)
from moetools.passes.sequential import TokenSample
from moetools.statistics.base import Reads, RoutedBatch, State
from moetools.text.tokens import TokenData

_SAMPLE_TOKENS = 2048
_LINEAR_TOLERANCE = 1e-3


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
        moe = layer.index in streams.teacher.stock.moe_layers
        self.weights: LayerWeights | None = streams.teacher.weights(layer) if moe else None
        self.fixed = streams.fixed_neurons(self.native, self.weights)
        self.activate = streams.activation
        self.sample: LayerSample | None = None

    def all_neurons(self) -> WideExpert:
        """Every neuron of every expert, shared ones last."""
        if self.weights is None:
            assert self.fixed is not None
            return self.fixed
        routed = stack_experts(self.weights, tuple(range(self.weights.num_experts)))
        return routed if self.fixed is None else join_experts((routed, self.fixed))

    def inputs_and_targets(self, held: bool, *, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs [T, D], what the FFN should add [T, D]) of the tokens that are (not) held out, batch by batch."""
        return self._streams.inputs_and_targets(held, every)

    def equations(self, ffn: WideExpert, *, every: int = 1) -> tuple[NormalEquations, NormalEquations]:
        """Equations of the FFN's down projection: (train, held out). `every` > 1 uses only every so many batches."""
        found = []
        for held in (False, True):
            sums = EquationSums([ffn.width], self._streams.teacher)
            for hidden_TD, target_TD in self.inputs_and_targets(held, every=every):
                sums.add(_all_slots(hidden_TD), target_TD, [ffn], self.activate)
            found.append(sums.result())
        return found[0], found[1]

    def finish(self, ffn: WideExpert) -> None:
        """Run the student's stream through the layer with its new FFN."""
        self._streams.finish(ffn)


class StudentStreams:
    """Streams teacher and student side by side.

    Args:
        kept: the teacher's layers that the student has, ascending.
        names: statistics to measure on the student's stream in front of every new FFN.
    """

    def __init__(self, teacher: StreamedModel, data: TokenData, kept: Sequence[int], names: Sequence[str]) -> None:
        self.teacher, self.data, self.kept = teacher, data, frozenset(kept)
        self._statistics = {name: load_statistic(name) for name in sorted(set(names))}
        self._shape = teacher.layer_shape(len(data.tasks))
        self.batches = [teacher.on_device(batch) for batch in data.batches]
        self._plan = teacher.memory_plan(self.batches, keep_native=True)
        self._plan.check()
        index, moe = next(iter(teacher.stock.moe_layers.items()))
        self.block = moe.block
        self.activation: Activate = family_activation(
            teacher.stock.layer(index).get_submodule(f"{moe.block}.{teacher.arch.experts}")
        )

    def layers(self) -> Iterator[StudentLayer]:
        """Every kept layer in order; `finish` must be called on it before the next one is asked for."""
        self._before, self._after, self._inputs, self._unfilled = (self._room() for _ in range(4))
        teacher = self.teacher
        teacher.embed(self.batches, self._before)
        teacher.embed(self.batches, self._after)
        self._check_linear = True
        pending: StudentLayer | None = None
        teacher.progress.start("fitting", layers=teacher.num_layers, tokens=self.data.num_tokens)
        try:
            for layer in teacher.layers(keep_native=True, prefetch=self._plan.prefetch):
                teacher.progress.layer(layer.index)
                if layer.index in self.kept:
                    if pending is not None:
                        yield pending
                    pending = self._measure(layer)
                for number, batch in enumerate(self.batches):
                    self._before[number] = teacher.run_layer(layer, batch, self._before[number])
                    teacher.progress.advance(batch.num_tokens)
            if pending is not None:
                yield pending
        finally:
            teacher.progress.stop()

    def last_hidden(self, number: int) -> Tensor:
        """The student's hidden states behind its last layer, [B, N, D]; once all layers are finished."""
        return self._after[number]

    def _room(self) -> Activations:
        teacher, budget = self.teacher, self._plan.activation_budget // 4
        return Activations(
            self.batches, width=teacher.hidden_size, dtype=teacher.dtype, device=teacher.device, budget=budget
        )

    def _measure(self, layer: LoadedLayer) -> StudentLayer:
        """The student's stream through the teacher's layer; keeps the FFN's inputs and what is there without it."""
        teacher = self.teacher
        states = {name: statistic.init(self._shape, teacher.device) for name, statistic in self._statistics.items()}
        self._scale = float(getattr(layer.module, "residual_multiplier", 1.0))
        sample = TokenSample(_SAMPLE_TOKENS, self.data.num_tokens)
        reads: frozenset[Reads] = frozenset().union(*(statistic.reads for statistic in self._statistics.values()))

        def consume(batch: RoutedBatch) -> None:
            sample.add(batch.hidden_TD, batch.router_logits_TE)
            for name, statistic in self._statistics.items():
                statistic.update(states[name], batch)

        observer = LayerObserver(consume)
        for number, batch in enumerate(self.batches):
            observer.batch = batch
            block = layer.module.get_submodule(self.block)
            with _no_output(block) as seen, teacher.observe(layer, reads, observer):
                unfilled = teacher.run_layer(layer, batch, self._after[number])
            if self._check_linear:
                self._refuse_normed(layer, number, unfilled, seen.output)
            self._inputs[number] = seen.input
            self._unfilled[number] = unfilled
        finalized = {name: statistic.finalize(states[name]) for name, statistic in self._statistics.items()}
        found = StudentLayer(self, layer, finalized)
        if found.weights is not None:
            hidden_ND, logits_NE = sample.result()
            found.sample = LayerSample(
                hidden_ND=hidden_ND, logits_NE=logits_NE, activate=self.activation, route=_never_routed
            )
        return found

    def _refuse_normed(self, layer: LoadedLayer, number: int, unfilled: Tensor, output: Tensor) -> None:
        """A layer adds its FFN's output to the residual stream as it is, or the target of the fit would be wrong."""
        behind = self.teacher.run_layer(layer, self.batches[number], self._after[number])
        difference = (behind - unfilled - self._scale * output).abs().max()
        if difference > _LINEAR_TOLERANCE * behind.abs().max() and self.teacher.dtype == torch.float32:
            raise UnsupportedModelError(
                f"model_type '{self.teacher.arch.model_type}' changes its FFN's output before adding it",
                hint="distillation to dense handles families that add the FFN's output to the residual stream",
            )
        self._check_linear = False

    def inputs_and_targets(self, held: bool, every: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(0, len(self.batches), every):
            rows_T = chosen_rows(self.batches[number], number, held)
            if rows_T is None:
                continue
            wanted = (self._before[number].float() - self._unfilled[number].float()) / self._scale
            hidden = self._inputs[number].flatten(0, 1)
            device = self.teacher.device
            yield hidden[rows_T].to(device).float(), wanted.flatten(0, 1)[rows_T].to(device)

    def fixed_neurons(self, native: dict[str, Tensor], weights: LayerWeights | None) -> WideExpert | None:
        """The FFN of a dense layer, or all shared experts of a MoE layer, as one FFN."""
        block = {name.removeprefix(f"{self.block}."): tensor for name, tensor in native.items()}
        prefixes = [""] if weights is None else _shared_prefixes(block)
        parts = [_dense_neurons(block, prefix) for prefix in prefixes]
        return join_experts(parts) if parts else None

    def finish(self, ffn: WideExpert) -> None:
        for number in range(len(self.batches)):
            hidden, unfilled = self._inputs[number], self._unfilled[number]
            added_TD = ffn_output(ffn, hidden.flatten(0, 1).to(self.teacher.device), self.activation)
            self._after[number] = unfilled + self._scale * added_TD.view(hidden.shape).to(unfilled)


def ffn_output(ffn: WideExpert, hidden_TD: Tensor, activate: Activate) -> Tensor:
    """down @ act(gate x, up x) + bias, [T, D] fp32."""
    return nn.functional.linear(intermediate(ffn, hidden_TD, activate), ffn.down_DW, ffn.down_bias_D)


def _all_slots(hidden_TD: Tensor) -> Slots:
    """Every token goes to the one FFN with weight 1."""
    count, device = len(hidden_TD), hidden_TD.device
    return Slots(
        hidden_TD=hidden_TD,
        token_S=torch.arange(count, device=device),
        weight_S=torch.ones(count, device=device),
        counts_E=torch.tensor([count], device=device),
    )


def _shared_prefixes(block: dict[str, Tensor]) -> list[str]:
    names = [name for name in block if name.endswith("down_proj.weight") and "shared" in name]
    return [name.removesuffix("down_proj.weight") for name in names]


def _dense_neurons(block: dict[str, Tensor], prefix: str) -> WideExpert:
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
