"""How long a run takes, for `--dry-run`: its first layers are made on a little of its text, and the clock is read."""

import copy
import logging
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moetools.errors import MoetoolsError
from moetools.forward.calibrate import collect_statistics
from moetools.forward.memory import MemoryPlan
from moetools.forward.progress import Silent
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.finished import NoUnits
from moetools.pipeline.verification import probe_batch, tensor_digests
from moetools.text.tokens import TokenData

if TYPE_CHECKING:
    from moetools.pipeline.work import Unit, Work

_DISK_BYTES_PER_SECOND = 5e8
_STOCK_SECONDS = 3.0
"""Of a process that imports transformers, less what of it is hidden behind the run."""
_SHARES = (16, 8)
_LEAST_SEQUENCES = 14
"""A ridge is chosen on every seventh."""
_MOST_LAYERS = 4
_SLOW = 5.0


def active_parameters(model: StreamedModel) -> int:
    """Parameters of all decoder layers that one token uses."""
    return sum(_active_parameters(model))


def expected_words(seconds: Mapping[str, float]) -> str:
    """What a dry run's report says of the time."""
    if "expected" not in seconds:
        return "the time is known once the input is made"
    return f"expected time about {seconds['expected']:.0f} s"


class Rehearsal:
    """Times parts of a run that is asked to write nothing.

    A method's first layers are made on 1/16 of the text, and again on 1/8; seconds are taken to be a + b tokens, and
    layers of one kind (MoE or dense) to take as long as each other. Writing is counted at 500 MB/s.

    Args:
        memory: the plan of the run.
        verify: whether the run will verify what it writes.
    """

    def __init__(self, memory: MemoryPlan, *, verify: bool) -> None:
        self._memory, self._verify = memory, verify

    def units(self, work: "Work[Any]") -> float:
        """Seconds of making all units of a work, and of writing and verifying them."""
        if work.data is None:
            return _rehearsed(work, self._memory, None) + self.writing(work)
        return _timed(work.data, lambda part: _rehearsed(work, self._memory, part)) + self.writing(work)

    def writing(self, work: "Work[Any]") -> float:
        """Seconds of writing the output and of reading it back."""
        disk = work.expected_bytes() / _DISK_BYTES_PER_SECOND
        return disk + (disk + _STOCK_SECONDS if self._verify else 0.0)

    def a_pass(self, model: StreamedModel, data: TokenData, tokens: int | None = None) -> float:
        """Seconds of a pass of the text, or of so many tokens like it, through all layers of a model."""
        return _timed(data, lambda part: self._pass_on(model, part), tokens)

    def _pass_on(self, model: StreamedModel, part: TokenData) -> float:
        start = time.monotonic()
        with _quietly(model), _shortened(model) as scale:
            collect_statistics(model, part, [], self._memory)
        return scale * (time.monotonic() - start)


def _timed(data: TokenData, seconds: Callable[[TokenData], float], tokens: int | None = None) -> float:
    """Seconds on all of the text, or on `tokens`, from those on its parts, or all of it where a part is too little.

    Raises:
        MoetoolsError: the run would end in it.
    """
    try:
        found = [(part.num_tokens, _warm(seconds, part)) for part in _parts(data)]
    except MoetoolsError:
        found = [(data.num_tokens, seconds(data))]
    return _extrapolated(found, data.num_tokens if tokens is None else tokens)


def _warm(seconds: Callable[[TokenData], float], part: TokenData) -> float:
    """Seconds of the second time, where the first was quick."""
    took = seconds(part)
    return took if took > _SLOW else seconds(part)


def _rehearsed(work: "Work[Any]", memory: MemoryPlan, data: TokenData | None) -> float:
    """Seconds of a copy of the work on some of its text, brought up to all layers."""
    acted = copy.copy(work)
    acted.data, acted.memory_plan, acted.rehearsed = data, memory, True
    with tempfile.TemporaryDirectory(prefix="moetools-") as scratch, _quietly(acted.model), torch.no_grad():
        start = time.monotonic()
        with _shortened(acted.model) as scale:
            acted.prepare(Path(scratch))
        before = scale * (time.monotonic() - start)
        return before + sum(_units_timed(acted))


def _units_timed(work: "Work[Any]") -> tuple[float, float]:
    """Seconds of what is outside the layers, as far as it comes before them, and of all layers."""
    model = work.output()
    batch = model.on_device(probe_batch(work.data, model.vocab_size))
    rest, hidden, took = 0.0, None, defaultdict[bool, list[float]](list)
    start = time.monotonic()
    with closing(work.units(NoUnits())) as units:
        for unit in units:
            _act(unit)
            if unit.index is None:
                rest += time.monotonic() - start
                start = time.monotonic()
                continue
            hidden = model.skeleton.enter(batch)[0] if hidden is None else hidden
            hidden = model.run_tensors(unit.index, unit.tensors, batch, hidden)
            took[unit.index in model.stock.moe_layers].append(time.monotonic() - start)
            if unit.index + 1 == _layers_rehearsed(model):
                break
            start = time.monotonic()
    return rest, _all_layers(model, took)


def _act(unit: "Unit") -> None:
    """What is done with a unit but for writing it."""
    tensor_digests(unit.tensors)
    unit.on_disk()


def _all_layers(model: StreamedModel, took: Mapping[bool, Sequence[float]]) -> float:
    """Seconds of all layers; those of a kind that was not made count like the others."""
    seen = [one for found in took.values() for one in found]
    means = {kind: sum(found) / len(found) for kind, found in took.items()}
    return sum(means.get(kind, sum(seen) / len(seen)) for kind in _kinds(model))


def _kinds(model: StreamedModel) -> list[bool]:
    """Of every layer, whether it is an MoE layer."""
    return [index in model.stock.moe_layers for index in range(model.num_layers)]


def _layers_rehearsed(model: StreamedModel) -> int:
    """The first layers, so many that one of each kind is among them."""
    kinds = _kinds(model)
    return min(_MOST_LAYERS, 1 + max(kinds.index(kind) for kind in set(kinds)))


@contextmanager
def _shortened(model: StreamedModel) -> Iterator[float]:
    """The model with its first layers only; yields by how much the whole one is larger, in active parameters."""
    layers, active = model.num_layers, _active_parameters(model)
    model.num_layers = _layers_rehearsed(model)
    try:
        yield sum(active) / max(1, sum(active[: model.num_layers]))
    finally:
        model.num_layers = layers


def _active_parameters(model: StreamedModel) -> list[int]:
    """Parameters of every decoder layer that one token uses."""
    found = []
    for index in range(model.num_layers):
        layer = model.stock.layer(index)
        total = sum(parameter.numel() for parameter in layer.parameters())
        moe = model.stock.moe_layers.get(index)
        if moe is not None:
            shape, module = model.layer_shape(1), layer.get_submodule(moe.inside(model.arch.experts))
            experts = sum(parameter.numel() for parameter in module.parameters())
            total += experts * shape.top_k // shape.num_experts - experts
        found.append(total)
    return found


@contextmanager
def _quietly(model: StreamedModel) -> Iterator[None]:
    """Nothing of a rehearsal is shown: what it warns of is of a part of the text."""
    shown, model.progress = model.progress, Silent()
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(disabled)
        model.progress = shown


def _parts(data: TokenData) -> list[TokenData]:
    """A smaller and a larger part of the text, whole batches of every task; all of it where there is not enough."""
    found = [part for part in (_part(data, share) for share in _SHARES) if part.num_sequences >= _LEAST_SEQUENCES]
    return found if len(found) == len(_SHARES) and found[0].num_tokens < found[1].num_tokens else [data]


def _part(data: TokenData, share: int) -> TokenData:
    """Of every task's batches evenly one in `share`, at least one or two."""
    chosen = []
    for _, same in groupby(data.batches, key=lambda batch: int(batch.task[0])):
        batches = list(same)
        count = min(len(batches), max(_SHARES[0] // share, round(len(batches) / share)))
        chosen += [batches[number * len(batches) // count] for number in range(count)]
    return replace(data, batches=tuple(chosen))


def _extrapolated(found: Sequence[tuple[int, float]], tokens: int) -> float:
    """Seconds at `tokens` of a line through (tokens, seconds); of one point, as many seconds per token."""
    *smaller, (most, seconds) = found
    if not smaller:
        return seconds * (tokens / most if most else 1.0)
    ((few, fewer_seconds),) = smaller
    slope = max(0.0, (seconds - fewer_seconds) / (most - few))
    return max(seconds - slope * most, 0.0) + slope * tokens
