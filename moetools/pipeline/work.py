"""What a verb tells the pipeline: what each part of the output becomes, and what the run needs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.writer import OutputWriter
from moetools.forward.memory import MemoryPlan
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.passes.stored import Stored
from moetools.pipeline.stages import Stages
from moetools.pipeline.table import Table
from moetools.text.tokens import TokenData

Facts = Mapping[str, Any]
"""JSON-able: what a report says of one unit."""


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How an output is written, the same for every verb.

    Attributes:
        overwrite: replace OUT if it is a checkpoint, and throw away what an interrupted run left.
        resume: go on from the last finished layer of an interrupted run.
        dry_run: check everything and show sizes, memory and time; write nothing.
        verify: reload OUT and compare every tensor and the logits of a probe batch with what was meant.
    """

    overwrite: bool = False
    resume: bool = False
    dry_run: bool = False
    verify: bool = True


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of the output on its way to disk.

    Attributes:
        index: its decoder layer in the output; None for everything outside the layers.
        tensors: as a loader will see them: those of a layer by name inside the layer (`StockModel.read_layer`), those
            outside by name on disk, dequantized.
        on_disk: makes the tensors as they are stored, by name on disk; called only if the unit is not finished.
        facts: for the report; of a finished unit those that were stored with it.
    """

    index: int | None
    tensors: Mapping[str, Tensor]
    on_disk: Callable[[], Mapping[str, Tensor]]
    facts: Facts = field(default_factory=dict)


class Finished(Protocol):
    """Units that an interrupted run had finished.

    Called with the index of a layer of the output (None: what is outside) it gives the unit's tensors as `Unit.tensors`
    has them, or None for a unit that is still to be made.
    """

    def __call__(self, index: int | None) -> Mapping[str, Tensor] | None: ...

    def facts(self, index: int | None) -> Facts:
        """The facts that were stored with a finished unit."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What carrying out a work came to.

    Attributes:
        out: where the output is, or will be.
        checkpoint: what was written; None in a dry run, and for a folder of several.
        dry_run: nothing was written.
        facts: of every unit.
        seconds, peak_memory: wall time and most bytes in use (resident, or on the GPU) by stage; a dry run has the
            seconds "expected".
        memory: the plan of the run.
        notes: what a reader should know about the output.
    """

    out: Path
    checkpoint: Checkpoint | None
    facts: Mapping[int | None, Facts]
    seconds: Mapping[str, float]
    peak_memory: Mapping[str, int]
    memory: MemoryPlan
    verified: bool
    notes: Sequence[str] = ()
    dry_run: bool = False

    @property
    def layers(self) -> dict[int, Facts]:
        """Facts of the decoder layers that have some."""
        return {index: facts for index, facts in self.facts.items() if index is not None and facts}


class Report(Protocol):
    """What every verb returns."""

    def to_json(self) -> Mapping[str, Any]: ...

    def tables(self) -> Sequence[Table]: ...

    def card(self) -> str:
        """README.md of the output."""
        ...


class Output(ABC):
    """Something to be made at one place. `__init__` makes every check that needs neither weights nor text.

    Attributes:
        source: the checkpoint whose files that are no weights are carried over; may be known only after `prepare`.
        model: the model that is changed, or measured.
        forward: how models are run.
        how: how the output is written, set by `carry_out`.
    """

    source: Checkpoint
    model: StreamedModel
    forward: ForwardOptions
    how: Writing

    def inputs(self) -> Sequence[Checkpoint]:
        """Checkpoints that must be the same at the end as at the start."""
        return [self.source]

    def reads(self) -> Mapping[str, Path]:
        """Every path that the run reads: what it is -> where."""
        return {"model": self.source.path}

    def writes(self) -> Mapping[str, Path]:
        """Every path that the run writes beside the output."""
        return {}

    @abstractmethod
    def expected_bytes(self) -> int:
        """Of all tensors of the output, and of checkpoints on the way to it."""

    def load(self) -> None:  # noqa: B027 - some read no text
        """Read the text, and check whatever depends on it."""

    @abstractmethod
    def memory(self) -> MemoryPlan:
        """Where the bytes of the whole run go."""

    @abstractmethod
    def estimate(self) -> float:
        """Seconds the run will take."""

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """What determines every byte of the output, so that only the same run is ever resumed; JSON-able."""

    @abstractmethod
    def report(self, outcome: Outcome) -> Report:
        """The record of the run."""


class Work(Output):
    """A checkpoint to be made, unit by unit.

    Attributes:
        data: calibration tokens, set by `load`; the probe batch is taken from them.
        stock: whether stock transformers is meant to load the output.
    """

    data: TokenData | None = None
    stock: bool = True

    def prepare(self, scratch: Path) -> None:
        """What comes before the units; `scratch` keeps what a resumed run needs of it."""

    @abstractmethod
    def output(self) -> StreamedModel:
        """The model that runs the units, with the output's config; known after `prepare`."""

    def config(self) -> dict[str, Any]:
        """config.json of the output; known after `prepare`."""
        return self.output().config

    @abstractmethod
    def units(self, finished: Finished) -> Iterator[Unit]:
        """Every unit, layers in order; finished ones are replayed, never made again.

        Before the first layer is yielded, the model of `output` has what is outside its layers.
        """

    def complete(self, contents: Path) -> None:
        """Put other files into the output, which is otherwise whole."""


class Folder(Output):
    """A folder to be made of finished parts: checkpoints in `scratch`, and files beside them."""

    @abstractmethod
    def fill(self, writer: OutputWriter, stages: Stages) -> None:
        """Make the parts (`stage_checkpoint`), and put them and the files beside them into the output."""


def layers_of(finished: Finished) -> Stored:
    """The finished layers alone, as passes take them."""
    return lambda index: finished(index)
