"""What a verb tells the pipeline: what each part of the output becomes, and what the run needs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.writer import OutputWriter
from moetools.forward.memory import MemoryPlan
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.estimate import Rehearsal
from moetools.pipeline.finished import FinishedUnits
from moetools.pipeline.options import Writing
from moetools.pipeline.outline import Outline
from moetools.pipeline.stages import Stages
from moetools.pipeline.table import Table
from moetools.pipeline.verification import Intended
from moetools.text.tokens import TokenData

Facts = Mapping[str, Any]
"""JSON-able: what a report says of one unit."""


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


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What carrying out a work came to.

    Attributes:
        out: where the output is, or will be.
        checkpoint: what was written; None in a dry run, and for a folder of several.
        dry_run: nothing was written.
        facts: of every unit.
        seconds, peak_memory: wall time and most bytes in use (resident, or on the GPU) by stage; "of it NAME" are the
            seconds of what layers do in them; a dry run has the seconds "expected".
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


Made = TypeVar("Made", bound=Report, covariant=True)


class Output(ABC, Generic[Made]):
    """Something to be made at one place. `__init__` makes every check that needs neither weights nor text.

    Attributes:
        source: the checkpoint whose files that are no weights are carried over; may be known only after `prepare`.
        model: the model that is changed, or measured.
        forward: how models are run.
        how, memory_plan: how the output is written, and where the bytes of the run go; set by `carry_out`.
    """

    source: Checkpoint
    model: StreamedModel
    forward: ForwardOptions
    how: Writing
    memory_plan: MemoryPlan

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

    def load(self) -> None:
        """Read the text, and check whatever depends on it."""

    def outline(self) -> Outline | None:
        """What the output will be, where it is known before it is made."""
        return None

    @abstractmethod
    def memory(self) -> MemoryPlan:
        """Where the bytes of the whole run go."""

    @abstractmethod
    def estimate(self, rehearsal: Rehearsal) -> float:
        """Seconds the run will take."""

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """What determines every byte of the output, so that only the same run is ever resumed; JSON-able."""

    @abstractmethod
    def report(self, outcome: Outcome) -> Made:
        """The record of the run."""


class Work(Output[Made]):
    """A checkpoint to be made, unit by unit.

    Attributes:
        data: calibration tokens, set by `load`; the probe batch is taken from them.
        stock: whether stock transformers is meant to load the output.
        rehearsed: nothing is to be written, not even beside the output.
    """

    data: TokenData | None = None
    stock: bool = True
    rehearsed: bool = False

    def estimate(self, rehearsal: Rehearsal) -> float:
        return rehearsal.units(self)

    def prepare(self, scratch: Path) -> None:
        """What comes before the units; `scratch` keeps what a resumed run needs of it."""

    @abstractmethod
    def output(self) -> StreamedModel:
        """The model that runs the units, with the output's config; known after `prepare`."""

    def config(self) -> dict[str, Any]:
        """config.json of the output; known after `prepare`, up to what is found out while the units are made."""
        return self.output().config

    @abstractmethod
    def units(self, finished: FinishedUnits) -> Generator[Unit]:
        """Every unit, layers in order; finished ones are replayed, never made again.

        Before the first layer is yielded, the model of `output` has what is outside its layers.
        """

    def check(self, intended: Intended) -> None:
        """Refuse what the units came to. Raises VerificationError."""

    def complete(self, contents: Path) -> None:
        """Put other files into the output, which is otherwise whole."""


class Folder(Output[Made]):
    """A folder to be made of finished parts: checkpoints in `scratch`, and files beside them."""

    @abstractmethod
    def fill(self, writer: OutputWriter, stages: Stages) -> None:
        """Make the parts (`stage_checkpoint`), and put them and the files beside them into the output."""


def whole_rest(
    model: StreamedModel, source: Checkpoint, without: Collection[str] = (), *, packed: bool = False
) -> Unit:
    """What is outside the layers, as the source has it, less some of what stock transformers does not load.

    Args:
        packed: packed tensors stay as they lie on disk.
    """
    names = [*model.stock.names[None], *(name for name in model.stock.extra_names if name not in without)]
    rest = source.read(names)
    return Unit(index=None, tensors=rest, on_disk=lambda: source.read_stored(names) if packed else rest)


def never() -> Mapping[str, Tensor]:
    """`on_disk` of a unit that is finished."""
    raise AssertionError("a finished unit is not written again")
