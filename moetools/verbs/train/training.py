"""The training itself: teacher and student in memory, the loop, and what is kept of it for a resumed run."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetools.architectures.building import from_config
from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.shards import file_digest, write_tensors
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.formats.reader import PackedCheckpoint
from moetools.forward.evaluate import Evaluator
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.text.tokens import TokenBatch, TokenData, pad_right
from moetools.training.cache import CachedTeacher
from moetools.training.data import Sequences
from moetools.training.distiller import Distiller, OnlineTeacher, Teacher
from moetools.training.models import check_head, load_dequantized, load_whole
from moetools.training.processes import main_process_first
from moetools.training.trainer import TrainResult, train
from moetools.verbs.train.plan import TrainingPlan
from moetools.verbs.train.report import TrainingReport

METRICS = "metrics.jsonl"


class Training:
    """One training of `plan.student` towards `plan.teacher`.

    Args:
        vocabulary: rows of both heads that stand for tokens.
    """

    def __init__(self, plan: TrainingPlan, vocabulary: int, *, progress: Progress) -> None:
        self.plan, self.vocabulary, self.progress = plan, vocabulary, progress
        self.teacher, self.student, self.forward, self.training = (
            plan.teacher,
            plan.student,
            plan.forward,
            plan.training,
        )

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        return stored_dtypes(self.student)

    def train(self, folder: Path, *, resume: bool) -> tuple[TrainingReport, Mapping[str, Tensor]]:
        """Train, with checkpoints and record in `folder`; what was done, and the best weights by name in the model.

        Where several processes train together, each calls this.
        """
        options = self.training
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
            metrics=folder / METRICS,
            stored=self._dtypes,
            resume=resume,
            progress=self.progress,
        )
        trained = sum(one.numel() for one in student.parameters() if one.requires_grad)
        every = sum(one.numel() for one in student.parameters())
        del distiller, student, teacher
        report = TrainingReport(
            student=str(self.student.checkpoint.path),
            teacher=str(self.teacher.checkpoint.path),
            part=self.training.train,
            parameters=(trained, every),
            options=asdict(options),
            curve=result.curve,
            steps=result.steps,
            best_step=result.best_step,
            tokens=result.tokens,
            seconds=round(result.seconds, 3),
            stopped=result.stopped,
            baseline=self._baseline(result, folder) if self.training.train_baseline else None,
            cached=cached,
        )
        return report, result.state

    def _teacher(self) -> tuple[Teacher | None, int | None]:
        """Where targets come from (None if nothing is asked of the teacher), and the bytes of a cache."""
        options = self.training
        if options.loss.alpha == 1.0 and not options.hidden_weight:
            return None, None
        if self.plan.cache is None:
            model = self._whole(self.teacher, self.teacher.dtype, trainable=False)
            return OnlineTeacher(model, self.vocabulary), None
        with main_process_first():
            self.plan.cache.capture()
        return CachedTeacher(self.plan.cache), self.plan.cache.nbytes

    def _whole(self, streamed: StreamedModel, dtype: torch.dtype, *, trainable: bool) -> Any:
        """The whole stock model of a checkpoint, decoded by moetools where that is packed."""
        checkpoint, forward = streamed.checkpoint, self.forward
        if isinstance(checkpoint, PackedCheckpoint):
            decoded = replace(forward, dtype=str(dtype).removeprefix("torch."))
            model = load_dequantized(StreamedModel(checkpoint, decoded)).requires_grad_(trainable)
        else:
            code = forward.trust_remote_code
            model = load_whole(
                checkpoint.path, dtype=dtype, device=streamed.device, trainable=trainable, trust_remote_code=code
            )
        check_head(model, checkpoint.path)
        return model

    def _load_student(self) -> Any:
        student = self._whole(self.student, torch.float32, trainable=True)
        names = self.plan.trained_names()
        if names is not None:
            for name, parameter in student.named_parameters():
                parameter.requires_grad_(name in names)
        return student

    def _baseline(self, result: TrainResult, folder: Path) -> dict[str, Any]:
        """Cross-entropy on the held-out sequences of the student, the teacher, and a student without a teacher."""
        options = replace(
            self.training, alpha=1.0, hidden_weight=0.0, steps=result.steps, epochs=None, max_minutes=None
        )
        if self.training.train_baseline == "scratch":
            torch.manual_seed(options.seed)
            student = from_config(self.student.stock.model.config, dtype=torch.float32).to(self.student.device)
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
            "kind": self.training.train_baseline,
            "steps": baseline.steps,
            "cross_entropy": {"teacher": sparse, "student": own, "baseline": dense},
            "gain_kept": kept,
        }


def stored_dtypes(model: StreamedModel) -> dict[str, torch.dtype]:
    """Dtype on disk of every tensor by its name in the model."""
    stock = model.stock
    rest = {name: TORCH_DTYPES[model.checkpoint.tensors[name].dtype] for name in stock.names[None]}
    prefix = f"{stock.decoder_path}.layers.".lstrip(".")
    layers = range(stock.num_layers)
    inside = {f"{prefix}{index}.{name}": one.dtype for index in layers for name, one in stock.read_layer(index).items()}
    return rest | inside


def held_out_cross_entropy(model: StreamedModel, sequences: Sequences) -> float:
    """Of the held-out sequences, in nats per token; the model is streamed."""
    batches = []
    for number in sequences.held_out:
        ids, mask = pad_right([sequences.ids[number]], 0)
        batches.append(TokenBatch(input_ids=ids, attention_mask=mask, task=torch.zeros(1, dtype=torch.int64)))
    data = TokenData(tasks=("held out",), batches=tuple(batches), fingerprint="", seq_len=0)
    perplexity = Evaluator(data).measure(model).tasks["held out"].perplexity
    return float(torch.tensor(perplexity, dtype=torch.float64).log())


def save_trained(report: TrainingReport, state: Mapping[str, Tensor], record: Path, weights: Path) -> None:
    """Keep a finished training for a run that is resumed behind it; the record is written last."""
    # Tied weights are one tensor under several names; each name gets a copy.
    _, _, digest = write_tensors(weights, {name: tensor.contiguous() for name, tensor in state.items()})
    write_durably(record, json.dumps({"weights": digest, "report": report.to_json()}).encode())


def load_trained(record: Path, weights: Path) -> TrainingReport | None:
    """What `save_trained` kept; None if there is nothing, or the weights have changed since."""
    if not (record.is_file() and weights.is_file()):
        return None
    kept = read_json_object(record)
    if file_digest(weights) != kept["weights"]:
        return None
    stored = kept["report"]
    return TrainingReport(**{**stored, "parameters": tuple(stored["parameters"])})
