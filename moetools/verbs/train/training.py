"""Train a checkpoint towards a teacher's predictions, from folder to folder: a fresh student, or one to be healed."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from moetools.checkpoint.output import staging_path
from moetools.checkpoint.reader import open_checkpoint
from moetools.checkpoint.writer import CheckpointWriter, check_output
from moetools.formats.reader import open_model
from moetools.forward.evaluate import Evaluator
from moetools.forward.progress import Progress, Silent
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.pipeline.verification import verify_checkpoint
from moetools.printable import in_code, in_markdown, printable
from moetools.text.tokens import TokenBatch, TokenData, load_tokenizer, pad_right
from moetools.training.cache import CachedTeacher
from moetools.training.data import Sequences
from moetools.training.distiller import Distiller, OnlineTeacher, Teacher
from moetools.training.models import check_head, common_vocabulary, load_dequantized, load_whole
from moetools.training.processes import join_processes, main_process_first
from moetools.training.trainer import TrainResult, train
from moetools.verbs.evaluate.verb import check_same_tokenizer
from moetools.verbs.reduce.report import versions
from moetools.verbs.train.plan import StudentTraining, TrainingPlan
from moetools.verbs.train.writing import stored_dtypes, write_trained


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What a training did.

    Attributes:
        student, teacher: folders.
        part: what was trained.
        parameters: trained, and all of the student's.
        options: settings of the training.
        curve: held-out loss on the way; the last line may be worse than `best_step`'s, whose weights were written.
        baseline: the same student trained without the teacher, and the share of the sparse gain kept; None without.
        cached: bytes of the teacher's cached predictions; None where the teacher ran beside the student.
    """

    student: str
    teacher: str
    part: str
    parameters: tuple[int, int]
    options: Mapping[str, Any]
    curve: Sequence[Mapping[str, float]]
    steps: int
    best_step: int
    tokens: int
    seconds: float
    stopped: str | None
    baseline: Mapping[str, Any] | None = None
    cached: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {**self.__dict__, "options": _plain(self.options)}


Describe = Callable[[TrainingReport, Path], tuple[Mapping[str, Any], str | None]]
"""`moetools.json` and README.md (None: as the student's) of a training and the folder it was written to."""


class TrainingRun:
    """One training; every check that needs no weights is made in `__init__`.

    Raises:
        UserError: other vocabulary or tokenizer, illegal part, unusable output, too little memory.
        CheckpointError, UnsupportedModelError, DataError: an input that cannot be used.
    """

    def __init__(
        self,
        teacher: Path,
        student: Path,
        out: Path,
        data: TokenData,
        forward: ForwardOptions,
        training: StudentTraining,
        *,
        tokenizer: Path | None = None,
        overwrite: bool = False,
        resume: bool = False,
        verify: bool = True,
        progress: Progress | None = None,
    ) -> None:
        training.check()
        self.out, self.data, self.forward, self.training = Path(out), data, forward, training
        self.overwrite, self.resume, self.verify = overwrite, resume, verify
        self.progress: Progress = progress or Silent()
        self.teacher_source, self.student_source = open_checkpoint(teacher), open_model(student)
        self.teacher = StreamedModel(self.teacher_source, forward, progress=progress)
        self.student = StreamedModel(self.student_source, forward, progress=progress)
        for model in (self.teacher, self.student):
            model.stock.check_names()
        check_same_tokenizer(self.teacher_source.path, self.student_source.path)
        self.vocabulary = common_vocabulary(
            self.teacher.vocab_size, self.student.vocab_size, known_tokens(self.teacher, data, tokenizer)
        )
        self.plan = TrainingPlan(self.teacher, self.student, data, forward, training)
        self.plan.check_memory()
        check_output(self.out, self.student_source, overwrite, resume, self.student_source.total_bytes)

    def settings(self) -> dict[str, Any]:
        """What determines the result, as far as it is not a matter of time."""
        training = {key: _plain(value) for key, value in asdict(self.training).items() if key != "cache"}
        return {
            "verb": "distill",
            "student": self.student_source.fingerprint(),
            "teacher": self.teacher_source.fingerprint(),
            "data": self.data.fingerprint,
            "training": training,
            "dtype": str(self.student.dtype),
        }

    def run(self, describe: Describe) -> TrainingReport:
        """Train and write, with what `describe` says of it.

        Where several processes train together, each calls this, and the first one writes.
        """
        if not join_processes(on_cpu=self.student.device.type == "cpu"):
            return self._train(staging_path(self.out) / "scratch")[0]
        with CheckpointWriter(
            self.out,
            source=self.student_source,
            plan=self.settings(),
            expected_bytes=self.student_source.total_bytes,
            overwrite=self.overwrite,
            resume=self.resume,
        ) as writer:
            report, state = self._train(writer.scratch)
            trained = {name: tensor for name, tensor in state.items() if name not in self.plan.packed}
            intended = write_trained(writer, self.student, trained, self.data)
            shutil.copyfile(writer.scratch / "metrics.jsonl", writer.contents / "metrics.jsonl")
            contents = writer.assemble()
            if self.verify:
                verify_checkpoint(contents, self.forward, intended, source=self.student_source, progress=self.progress)
            record, card = describe(report, contents)
            writer.write_json("moetools.json", record)
            if card is not None:
                writer.write_text("README.md", card)
            writer.commit()
        return report

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        return stored_dtypes(self.student)

    def _train(self, folder: Path) -> tuple[TrainingReport, Mapping[str, Tensor]]:
        options = self.training.train
        teacher, cached = self._teacher()
        student = self._load_student()
        distiller = Distiller(
            student, teacher, options.loss, vocabulary=self.vocabulary, hidden_weight=options.hidden_weight
        )
        result = train(
            distiller,
            self.plan.sequences,
            options,
            folder / "training",
            metrics=folder / "metrics.jsonl",
            stored=self._dtypes,
            resume=self.resume,
            progress=self.progress,
        )
        trained = sum(one.numel() for one in student.parameters() if one.requires_grad)
        every = sum(one.numel() for one in student.parameters())
        del distiller, student, teacher
        report = TrainingReport(
            student=str(self.student_source.path),
            teacher=str(self.teacher_source.path),
            part=self.training.part,
            parameters=(trained, every),
            options=asdict(options),
            curve=result.curve,
            steps=result.steps,
            best_step=result.best_step,
            tokens=result.tokens,
            seconds=round(result.seconds, 3),
            stopped=result.stopped,
            baseline=self._baseline(result, folder) if self.training.baseline else None,
            cached=cached,
        )
        return report, result.state

    def _teacher(self) -> tuple[Teacher | None, int | None]:
        """Where targets come from (None if nothing is asked of the teacher), and the bytes of a cache."""
        options = self.training.train
        if options.loss.alpha == 1.0 and not options.hidden_weight:
            return None, None
        if self.plan.cache is None:
            model = load_whole(
                self.teacher_source.path,
                dtype=self.teacher.dtype,
                device=self.teacher.device,
                trainable=False,
                trust_remote_code=self.forward.trust_remote_code,
            )
            check_head(model, self.teacher_source.path)
            return OnlineTeacher(model, self.vocabulary), None
        with main_process_first():
            self.plan.cache.capture()
        return CachedTeacher(self.plan.cache), self.plan.cache.nbytes

    def _load_student(self) -> Any:
        if self.plan.packed:
            student = load_dequantized(StreamedModel(self.student_source, replace(self.forward, dtype="float32")))
        else:
            student = load_whole(
                self.student_source.path,
                dtype=torch.float32,
                device=self.student.device,
                trainable=True,
                trust_remote_code=self.forward.trust_remote_code,
            )
        check_head(student, self.student_source.path)
        names = self.plan.trained_names()
        if names is not None:
            for name, parameter in student.named_parameters():
                parameter.requires_grad_(name in names)
        return student

    def _baseline(self, result: TrainResult, folder: Path) -> dict[str, Any]:
        """Cross-entropy on the held-out sequences of the student, the teacher, and a student without a teacher."""
        alone = replace(self.training.train.loss, alpha=1.0)
        options = replace(
            self.training.train, loss=alone, hidden_weight=0.0, steps=result.steps, epochs=None, minutes=None
        )
        if self.training.baseline == "scratch":
            torch.manual_seed(options.seed)
            student = transformers.AutoModelForCausalLM.from_config(
                self.student.stock.model.config, dtype=torch.float32
            ).to(self.student.device)
        else:
            student = self._load_student()
        baseline = train(
            Distiller(student, None, options.loss, vocabulary=self.vocabulary),
            self.plan.sequences,
            options,
            folder / "baseline",
            metrics=folder / "baseline.jsonl",
            stored=self._dtypes,
            progress=self.progress,
        )
        own = min(point["cross_entropy"] for point in result.curve if point["step"] == result.best_step)
        dense = min(point["cross_entropy"] for point in baseline.curve)
        sparse = held_out_cross_entropy(self.teacher, self.plan.sequences)
        kept = (dense - own) / (dense - sparse) if dense > sparse else None
        return {
            "kind": self.training.baseline,
            "steps": baseline.steps,
            "cross_entropy": {"teacher": sparse, "student": own, "baseline": dense},
            "gain_kept": kept,
        }


def training_card(report: TrainingReport, name: str, command: str) -> str:
    """README.md of the output: what was trained, towards what, and how to do it again."""
    first, last = report.curve[0], next(one for one in report.curve if one["step"] == report.best_step)
    return f"""---
library_name: transformers
tags: [distillation, moetools]
---

# {in_markdown(name)}

Trained by moetools {versions()["moetools"]} towards the predictions of the Mixture-of-Experts
{in_code(report.teacher)}:
{report.best_step} steps, {report.tokens:,} tokens, {report.parameters[0]:,} of {report.parameters[1]:,} parameters.

| on held-out sequences | before | after |
|---|---|---|
| divergence from the teacher (nats per token) | {first["divergence"]:.4f} | {last["divergence"]:.4f} |
| cross-entropy (nats per token) | {first["cross_entropy"]:.4f} | {last["cross_entropy"]:.4f} |

```
{printable(command)}
```

How it was made, settings and versions are in `moetools.json`, the course of the training in `metrics.jsonl`.
"""


def known_tokens(teacher: StreamedModel, data: TokenData, tokenizer: Path | None) -> int:
    """One more than the largest id that may occur."""
    path = tokenizer or teacher.checkpoint.path
    used = max(int(batch.input_ids.max()) for batch in data.batches) + 1
    if not (path / "tokenizer.json").is_file():
        return used
    known = load_tokenizer(path, vocab_size=max(teacher.vocab_size, used))
    return max(used, max(known.get_vocab().values()) + 1)


def held_out_cross_entropy(model: StreamedModel, sequences: Sequences) -> float:
    """Of the held-out sequences, in nats per token; the model is streamed."""
    batches = []
    for number in sequences.held_out:
        ids, mask = pad_right([sequences.ids[number]], 0)
        batches.append(TokenBatch(input_ids=ids, attention_mask=mask, task=torch.zeros(1, dtype=torch.int64)))
    data = TokenData(tasks=("held out",), batches=tuple(batches), fingerprint="", seq_len=0)
    perplexity = Evaluator(data).measure(model).tasks["held out"].perplexity
    return float(torch.tensor(perplexity, dtype=torch.float64).log())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return str(value) if isinstance(value, Path) else value
