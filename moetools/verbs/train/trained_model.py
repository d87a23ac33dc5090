"""A checkpoint trained towards a teacher's predictions: one that exists, or one that is made first."""

import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.checkpoint.tensor_file import open_tensor_file
from moetools.formats.kept import carry_quantization_files, stock_problem
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.forward.memory import MemoryPlan
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.carry_out import stage_checkpoint
from moetools.pipeline.estimate import Rehearsal
from moetools.pipeline.finished import FinishedUnits
from moetools.pipeline.outline import Outline
from moetools.pipeline.work import Made, Outcome, Unit, Work
from moetools.text.options import DataOptions, load_tokens
from moetools.text.tokenizer import load_tokenizer
from moetools.text.tokens import TokenData
from moetools.training.models import common_vocabulary
from moetools.training.options import TrainOptions
from moetools.training.processes import wait_for_all
from moetools.verbs.evaluate.verb import check_same_tokenizer
from moetools.verbs.train.plan import TrainingPlan
from moetools.verbs.train.report import TrainingReport, plain
from moetools.verbs.train.training import METRICS, Training, load_trained, save_trained

_STUDENT, _STATE, _RECORD = "student", "trained.safetensors", "trained.json"


class TrainedModel(Work[Made]):
    """A student trained towards a teacher.

    Args:
        student: a checkpoint, or the work that makes it: it is then carried out first, beside the output.
        text: what it is trained on.

    Attributes:
        training: how it is trained.
        made: the outcome of making the student; None for one that exists.
        trained: what the training did; None before.

    Raises:
        UserError: other vocabulary or tokenizer, illegal part.
        CheckpointError, UnsupportedModelError: an input that cannot be used.
    """

    def __init__(
        self,
        teacher: Path,
        student: Path | Work[Any],
        text: DataOptions,
        forward: ForwardOptions,
        training: TrainOptions,
        *,
        progress: Progress | None,
    ) -> None:
        self.forward, self.training, self.text, self._progress = forward, training, text, progress
        self.teacher = StreamedModel(open_model(teacher), forward, progress=progress)
        self.teacher.stock.check_names()
        self.maker = student if isinstance(student, Work) else None
        self.made: Outcome | None = None
        self.trained: TrainingReport | None = None
        self._state: Mapping[str, Tensor] = {}
        if isinstance(student, Work):
            self.model, self.source = student.output(), student.source
        else:
            self._open(student)
            check_same_tokenizer(self.teacher.checkpoint.path, self.source.path)
        self._given = self.source

    def _open(self, student: Path) -> None:
        self.source: Checkpoint = open_model(student)
        self.model = StreamedModel(self.source, self.forward, progress=self._progress)
        packed = self.source if isinstance(self.source, PackedCheckpoint) else None
        self.stock = packed is None or not stock_problem(packed, self.model.arch)
        self.model.stock.check_names()

    def outline(self) -> Outline | None:
        return None if self.maker is None else self.maker.outline()

    def inputs(self) -> Sequence[Checkpoint]:
        return [self.teacher.checkpoint, self._given]

    def reads(self) -> Mapping[str, Path]:
        # A student's own text may have the same names.
        text = {f"{what} to train on": path for what, path in self.text.paths()}
        if self.maker is not None:
            return {**self.maker.reads(), **text}
        return {"teacher": self.teacher.checkpoint.path, "student": self.source.path, **text}

    def writes(self) -> Mapping[str, Path]:
        beside = {"`teacher_cache`": self.training.teacher_cache, "`tensorboard`": self.training.tensorboard}
        own = {what: path for what, path in beside.items() if path is not None}
        return own | (dict(self.maker.writes()) if self.maker is not None else {})

    def expected_bytes(self) -> int:
        student = self.maker.expected_bytes() if self.maker is not None else self.source.total_bytes
        # The best weights and the checkpoints of the training: weights and two moments in fp32, two at a time.
        parameters = sum(one.numel() for one in self.model.stock.model.parameters())
        saved = 2 * 3 if self.training.save_every else 1
        return student * (2 if self.maker is not None else 1) + 4 * parameters * saved

    def load(self) -> None:
        if self.maker is not None:
            self.maker.load()
        self.data: TokenData = self.read_text()
        self.vocabulary = common_vocabulary(
            self.teacher.vocab_size, self.model.vocab_size, known_tokens(self.teacher, self.data, self.text.tokenizer)
        )
        self.training = self.fitting_training()
        self.plan().check_memory()

    def read_text(self) -> TokenData:
        """What the student is trained on."""
        return load_tokens(self.text, self.teacher.checkpoint, self.teacher.vocab_size)

    def fitting_training(self) -> TrainOptions:
        """How the student is trained, known once the text is."""
        return self.training

    def plan(self) -> TrainingPlan:
        """What the training needs."""
        return TrainingPlan(self.teacher, self.model, self.data, self.forward, self.training)

    def memory(self) -> MemoryPlan:
        plan = self.model.memory_plan([], keep_native=True) if self.maker is None else self.maker.memory()
        cache = self.plan().cache
        return plan if cache is None else plan.covering(cache.memory())

    def estimate(self, rehearsal: Rehearsal) -> float:
        made = self.maker.estimate(rehearsal) if self.maker is not None else 0.0
        return made + self.plan().estimate(rehearsal) + rehearsal.writing(self)

    def settings(self) -> Mapping[str, Any]:
        training = {key: plain(value) for key, value in asdict(self.training).items() if key != "teacher_cache"}
        return {
            "student": self._given.fingerprint() if self.maker is None else dict(self.maker.settings()),
            "teacher": self.teacher.checkpoint.fingerprint(),
            "text": self.data.fingerprint,
            "training": training,
            "dtype": str(self.model.dtype),
        }

    def prepare(self, scratch: Path) -> None:
        self._scratch = scratch
        if self.maker is not None:
            self.made, folder = stage_checkpoint(self.maker, scratch, _STUDENT, self.how, self.memory_plan)
            wait_for_all()
            self._open(folder)
        self._train(scratch)

    def assist(self, scratch: Path) -> None:
        """The part of another process than the first in a training of several."""
        if self.maker is not None:
            wait_for_all()
            self._open(scratch / _STUDENT)
        self._run().train(scratch, resume=self.how.resume)

    def _run(self) -> Training:
        return Training(self.plan(), self.vocabulary, progress=self.model.progress)

    def _train(self, scratch: Path) -> None:
        """Train, or take up the result of an interrupted run that had."""
        record, state = scratch / _RECORD, scratch / _STATE
        self.trained = load_trained(record, state)
        if self.trained is None:
            report, trained = self._run().train(scratch, resume=self.how.resume)
            save_trained(report, trained, record, state)
            self.trained = load_trained(record, state)
        self._state = open_tensor_file(state).read()

    def trained_at(self, out: Path) -> TrainingReport | None:
        """What the training did; a student that was made for it was made for `out`, and its own folder is gone."""
        if self.trained is None or self.maker is None:
            return self.trained
        return replace(self.trained, student=str(out))

    def output(self) -> StreamedModel:
        return self.model

    def config(self) -> dict[str, Any]:
        return self.source.disk.config if isinstance(self.source, PackedCheckpoint) else self.model.config

    def units(self, finished: FinishedUnits) -> Generator[Unit]:  # noqa: ARG002 - the trained weights are all kept
        packed = self.plan().packed
        state = {name: tensor for name, tensor in self._state.items() if name not in packed}
        stock = self.model.stock
        prefix = f"{stock.decoder_path}.layers.".lstrip(".")
        rest = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        names = [*stock.names[None], *stock.extra_names]
        stored = stock.stored_tensors(None, rest)
        self._fill_rest(rest)
        dense = {**self.source.read(name for name in names if name not in stored), **stored}
        yield Unit(index=None, tensors=dense, on_disk=lambda: {**self.source.read_stored(names), **stored})
        for layer in self.model.layers(keep_native=True, fill=False):
            assert layer.native is not None
            yield self._unit(layer.index, layer.native, state, f"{prefix}{layer.index}.")

    def _unit(self, index: int, native: Mapping[str, Tensor], state: Mapping[str, Tensor], inside: str) -> Unit:
        new = {name: state[inside + name].to(old) for name, old in native.items() if inside + name in state}

        def on_disk() -> dict[str, Tensor]:
            stored = self.model.stock.stored_tensors(index, {inside + name: tensor for name, tensor in new.items()})
            return {**self.source.read_stored(self.model.stock.names[index]), **stored}

        return Unit(index=index, tensors={**native, **new}, on_disk=on_disk)

    def _fill_rest(self, rest: Mapping[str, Tensor]) -> None:
        """Give the model in memory the trained tensors outside its layers, rounded as on disk."""
        self.model.skeleton  # noqa: B018 - loads what is outside the layers
        inside = dict(self.model.stock.model.named_parameters())
        stored = {name: TORCH_DTYPES[info.dtype] for name, info in self.source.tensors.items()}
        for name, tensor in rest.items():
            if name in inside and not inside[name].is_meta:
                inside[name].data.copy_(tensor.to(stored.get(name, tensor.dtype)))

    def complete(self, contents: Path) -> None:
        if isinstance(self.source, PackedCheckpoint):
            carry_quantization_files(self.source, contents, {})
        shutil.copyfile(self._scratch / METRICS, contents / METRICS)


def known_tokens(teacher: StreamedModel, data: TokenData, tokenizer: Path | None) -> int:
    """One more than the largest id that may occur."""
    path = tokenizer or teacher.checkpoint.path
    used = max(int(batch.input_ids.max()) for batch in data.batches) + 1
    if not (path / "tokenizer.json").is_file():
        return used
    trusted = teacher.options.trust_remote_code
    known = load_tokenizer(path, vocab_size=max(teacher.vocab_size, used), trust_remote_code=trusted)
    return max(used, max(known.get_vocab().values()) + 1)
