"""Two models side by side, layer after layer: the original's hidden states, and those of the model made of it.

Their difference behind a layer, R = h_original - h_new_without_ffn, is what the new FFN of that layer should add, so
later layers repair what earlier ones lost.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.forward.activations import Activations
from moetools.forward.calibrate import load_statistic, statistics_bytes
from moetools.forward.experts import RoutedCall
from moetools.forward.memory import MemoryPlan
from moetools.forward.progress import announced
from moetools.forward.streaming import LayerObserver, LoadedLayer, StreamedModel
from moetools.methods.joint_refit import RefitBounds
from moetools.passes.layer_equations import chosen_rows, first_sequences
from moetools.statistics.base import Reads, RoutedBatch, State
from moetools.text.tokens import TokenBatch, TokenData

_ROOMS = 4
"""Of hidden states: both streams, the block's inputs, what is there without what the block adds."""
_SAMPLE_COPIES = 2
"""Of a token sample: its parts and all of them joined."""
_LEAST_SHARE = 32
"""Of what a solver needs at least, for each of its bounded parts, however little memory there is."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One batch behind a layer of the original, [B, N, D] each.

    Attributes:
        inputs: what the layer's new FFN will see.
        without: the hidden states behind the layer without what that FFN will add.
        behind: the original layer's own result; None where it was not computed.
    """

    inputs: Tensor
    without: Tensor
    behind: Tensor | None


class KeepingObserver(LayerObserver):
    """Also keeps the block's input and the routed experts' output of the last call, padding included."""

    routed_TD: Tensor | None = None
    hidden_TD: Tensor | None = None

    def __init__(self, consume: Callable[[RoutedBatch], None] | None) -> None:
        super().__init__(consume)

    def see(self, call: RoutedCall) -> None:
        self.routed_TD, self.hidden_TD = call.routed_TD, call.hidden_TD
        if self._consume is not None:
            super().see(call)


class TwoStreams(ABC):
    """The streams of a pass, and what a layer's new FFN is measured and solved on.

    Args:
        original: the model to compress; its layers run in both streams.
        names: statistics to measure on the new model's stream.
        plan: see `streams_plan`.
        sample_tokens: how many of a layer's inputs to keep, about.

    Attributes:
        before, after: hidden states of the original and of the new model; `after` is empty while the two are the same.
        inputs, without: of the current layer, see `Split`.
        scale: factor of what the current layer adds to its residual stream.
    """

    before: Activations
    after: Activations
    inputs: Activations
    without: Activations
    scale: float

    def __init__(
        self,
        original: StreamedModel,
        data: TokenData,
        names: Sequence[str],
        plan: MemoryPlan,
        *,
        sample_tokens: int,
    ) -> None:
        self.original, self.data, self._plan = original, data, plan
        self.statistics = {name: load_statistic(name) for name in sorted(set(names))}
        self._shape, self._sample_tokens = original.layer_shape(len(data.tasks)), sample_tokens
        self.batches = [original.on_device(batch) for batch in data.batches]
        self._first = first_sequences(self.batches)

    @abstractmethod
    def split(self, layer: LoadedLayer, batch: TokenBatch, hidden: Tensor, seen: KeepingObserver) -> Split:
        """Run a layer of the original on the new model's hidden states in front of it."""

    def walk(self, task: str) -> Iterator[LoadedLayer]:
        """The original's layers in order, while the streams exist."""
        original = self.original
        rooms = (original.activations(self.batches, self._plan) for _ in range(_ROOMS))
        self.before, self.after, self.inputs, self.without = rooms
        original.embed(self.batches, self.before)
        self._same = self.enter()
        with announced(original, task, self.data.num_tokens) as progress:
            for layer in original.layers(keep_native=True, prefetch=self._plan.prefetch):
                progress.layer(layer.index)
                progress.phase("calibrating")
                yield layer

    def enter(self) -> bool:
        """Put what enters the new model into `after`, where that is not what enters the original; whether it is."""
        return True

    def current(self, number: int) -> Tensor:
        """The new model's hidden states in front of the current layer, [B, N, D]."""
        return self.before[number] if self._same else self.after[number]

    def keep(self, layer: LoadedLayer) -> None:
        """Both streams through a layer that stays as it is."""
        for number, batch in enumerate(self.batches):
            if not self._same:
                self.after[number] = self.original.run_layer(layer, batch, self.after[number])
            self._advance_original(layer, number)

    def drop(self, layer: LoadedLayer) -> None:
        """The original's stream through a layer that the new model does not have."""
        for number in range(len(self.batches)):
            self._advance_original(layer, number)

    def _advance_original(self, layer: LoadedLayer, number: int, behind: Tensor | None = None) -> None:
        batch = self.batches[number]
        if behind is None:
            behind = self.original.run_layer(layer, batch, self.before[number])
        self.before[number] = behind
        self.original.progress.advance(batch.num_tokens)

    def measure(self, layer: LoadedLayer) -> tuple[dict[str, State], "TokenSample"]:
        """Both streams through a layer whose FFN will be replaced; statistics and a sample of the new one's inputs."""
        states = {
            name: statistic.init(self._shape, self.original.device) for name, statistic in self.statistics.items()
        }
        sample = TokenSample(self._sample_tokens, self.data.num_tokens)
        reads: frozenset[Reads] = frozenset().union(*(statistic.reads for statistic in self.statistics.values()))

        def consume(batch: RoutedBatch) -> None:
            sample.add(batch.hidden_TD, batch.router_logits_TE)
            for name, statistic in self.statistics.items():
                statistic.update(states[name], batch)

        self._through(layer, reads, KeepingObserver(consume))
        return states, sample

    def repeat(self, layer: LoadedLayer) -> None:
        """As `measure`, for a layer that was finished before: nothing is measured."""
        self._through(layer, frozenset(), KeepingObserver(None))

    def _through(self, layer: LoadedLayer, reads: frozenset[Reads], seen: KeepingObserver) -> None:
        self.scale = residual_scale(layer)
        for number, batch in enumerate(self.batches):
            seen.batch = batch
            with self.original.observe(layer, reads, seen):
                found = self.split(layer, batch, self.current(number), seen)
            self.inputs[number], self.without[number] = found.inputs, found.without
            self._advance_original(layer, number, found.behind if self._same else None)
        self._same = False

    def add(self, number: int, added_TD: Tensor) -> None:
        """The new model's stream of a batch behind the current layer, whose new FFN adds this."""
        without = self.without[number]
        self.after[number] = without + self.scale * added_TD.view(without.shape).to(without)

    def wanted(self, number: int) -> Float[Tensor, "T D"]:
        """What the new FFN should add for each token of a batch, fp32."""
        before, without = (room[number].to(self.original.device).float() for room in (self.before, self.without))
        return (before - without).flatten(0, 1) / self.scale

    def some(self, every: int) -> list[int]:
        """Every so many batches; all of them where those would have no held-out or no other tokens."""
        chosen = list(range(0, len(self.batches), every))
        enough = all(any(bool(self.rows(number, held).any()) for number in chosen) for held in (False, True))
        return chosen if enough else list(range(len(self.batches)))

    @property
    def feature_bytes(self) -> int:
        """What features may take that are kept between passes over them: half of what is left."""
        return self._plan.spare // 2

    @property
    def bounds(self) -> RefitBounds:
        """A quarter of what is left each for Gram blocks and for right-hand sides."""
        return RefitBounds(nbytes=max(self._plan.spare // 4, self._plan.scratch // _LEAST_SHARE))

    def rows(self, number: int, held: bool) -> Tensor:
        """Flat mask of the real tokens of a batch that are (not) held out."""
        return chosen_rows(self.batches[number], self._first[number], held)


def streams_plan(
    original: StreamedModel,
    other: StreamedModel,
    data: TokenData | None,
    names: Sequence[str],
    *,
    sample_tokens: int,
    solver: int = 0,
) -> MemoryPlan:
    """Where the bytes of two streams go.

    Args:
        other: the model made of the original; a layer of it is in memory at a time.
        names, sample_tokens: see `TwoStreams`.
        solver: bytes that the least squares of a layer need at least.
    """
    batches = data.batches if data else ()
    shape = original.layer_shape(len(data.tasks) if data else 1)
    sampled = sampled_tokens(sample_tokens, data.num_tokens) if data else 0
    sample = _SAMPLE_COPIES * 4 * sampled * (shape.hidden_size + shape.num_experts)
    scratch = solver + sample + statistics_bytes(names, shape)
    return original.memory_plan(batches, keep_native=True, beside=[other], rooms=_ROOMS, scratch=scratch)


def residual_scale(layer: LoadedLayer) -> float:
    """Factor of what a layer's FFN adds to the residual stream (Granite)."""
    return float(getattr(layer.module, "residual_multiplier", 1.0))


def sampled_tokens(size: int, num_tokens: int) -> int:
    """How many of so many tokens a `TokenSample` holds."""
    return -(-num_tokens // _step(size, num_tokens))


def _step(size: int, num_tokens: int) -> int:
    return max(1, num_tokens // size)


class TokenSample:
    """Evenly spaced tokens of the stream, about `size` of them."""

    def __init__(self, size: int, num_tokens: int) -> None:
        self._step = _step(size, num_tokens)
        self._seen = 0
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, hidden_TD: Tensor, logits_TE: Tensor) -> None:
        rows = slice((-self._seen) % self._step, None, self._step)
        self._kept.append((hidden_TD[rows].float(), logits_TE[rows].float()))
        self._seen += len(hidden_TD)

    def result(self) -> tuple[Tensor, Tensor]:
        hidden, logits = zip(*self._kept, strict=True)
        return torch.cat(hidden), torch.cat(logits)
