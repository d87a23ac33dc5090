"""What a training of a checkpoint is asked for and needs, checked before any weight is read."""

from functools import cached_property
from typing import Any

import torch

from moetools.errors import UserError
from moetools.forward.memory import default_budget
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.estimate import Rehearsal, active_parameters
from moetools.sizes import format_bytes
from moetools.text.tokens import TokenData
from moetools.training.cache import TeacherCache
from moetools.training.data import split_sequences
from moetools.training.options import TrainOptions, planned_steps, processes
from moetools.training.parameters import packed_names, trained_names

_STEP_PASSES = 3.0
"""Forward passes of the student that a step takes as long as."""


class TrainingPlan:
    """What a training needs, known before any weight is read; its memory is checked by `check_memory`.

    Attributes:
        sequences: those for training and those held out.
        cache: of the teacher's predictions; None where the teacher runs beside the student.

    Raises:
        UserError: an illegal part, a folder that is no cache.
        StatisticsError: a cache of something else.
        DataError: too little text.
    """

    def __init__(
        self,
        teacher: StreamedModel,
        student: StreamedModel,
        data: TokenData,
        forward: ForwardOptions,
        training: TrainOptions,
    ) -> None:
        self.teacher, self.student, self.forward, self.training = teacher, student, forward, training
        self.data = data
        self._check_part()
        self.sequences = split_sequences(data, seed=training.seed)
        self.cache: TeacherCache | None = None
        if training.teacher_cache is not None:
            self.cache = TeacherCache(training.teacher_cache, teacher, self.sequences, data, top=training.cache_top)

    def _check_part(self) -> None:
        if self.training.fsdp and self.student.device.type == "cpu":
            raise UserError("`fsdp` shards over GPUs; on a CPU several processes each hold the whole student")
        if self.training.train != "all" and not self.student.stock.moe_layers:
            raise UserError(
                f"`train={self.training.train}`: the student has no experts",
                hint="`train=all`",
            )
        if self.training.train == "experts" and trained_names(self.student, "experts") & self.packed:
            raise UserError(
                "`train=experts`: they are packed, and codes are not trained",
                hint="`train=all` trains what is not packed; or train the plain checkpoint: "
                "`moetools.quantize('MODEL', 'OUT', expand=True)`",
            )

    @cached_property
    def packed(self) -> frozenset[str]:
        """Names of the student's parameters that are packed on disk; they stay as they are."""
        return packed_names(self.student)

    def memory(self) -> dict[str, int]:
        """What a training keeps in memory, in bytes; activations are an estimate."""
        model, names = self.student.stock.model, self.trained_names()
        trained = sum(one.numel() for name, one in model.named_parameters() if names is None or name in names)
        every = sum(one.numel() for one in model.parameters())
        return {
            "teacher": 0 if self.training.teacher_cache else _bytes(self.teacher.stock.model, self.teacher.dtype),
            "student": 4 * every,
            "gradients and optimizer": 12 * trained,
            "best weights": 4 * every,
            "activations": self._activation_bytes(),
        }

    def memory_notes(self) -> tuple[str, ...]:
        """Lines for a dry run."""
        cache = [] if self.cache is None else [self.cache.describe()]
        return (f"training needs {format_bytes(self._needed())}: {self._sizes()}", *cache)

    def estimate(self, rehearsal: Rehearsal) -> float:
        """Seconds: the minutes asked for, or per token forward and backward of the student and a teacher's forward."""
        options = self.training
        if options.max_minutes is not None:
            return 60 * options.max_minutes
        steps = planned_steps(options, len(self.sequences.training), processes())
        tokens = steps * options.train_batch_size * options.accumulate * max(len(one) for one in self.sequences.ids)
        student = _STEP_PASSES * active_parameters(self.student) / active_parameters(self.teacher)
        return rehearsal.a_pass(self.teacher, self.data, tokens) * (1 + student)

    @property
    def fits(self) -> bool:
        """Teacher, student, gradients, two moments and activations of one batch fit together."""
        return self._needed() <= self._bound() or self.training.fsdp

    def check_memory(
        self, hint: str = "lower `train_batch_size`, add `gradient_checkpointing`, or use `teacher_cache`"
    ) -> None:
        """Refuse a training that does not fit.

        Raises:
            UserError: with the numbers.
        """
        if not self.fits:
            needed, bound = format_bytes(self._needed()), format_bytes(self._bound())
            raise UserError(f"training needs {needed} of {bound}: {self._sizes()}", hint=hint)

    def _needed(self) -> int:
        return sum(self.memory().values())

    def _bound(self) -> int:
        budget = self.forward.budget_bytes
        return default_budget(self.student.device) if budget is None else budget

    def _sizes(self) -> str:
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in self.memory().items())

    def _activation_bytes(self) -> int:
        options, config = self.training, self.student.stock.model.config.get_text_config()
        length = max(len(one) for one in self.sequences.ids)
        width, top_k = self.student._ffn_size()
        per_token = 16 * self.student.hidden_size + top_k * 5 * width + 2 * config.num_attention_heads * length
        layers = 2 if options.gradient_checkpointing else self.student.num_layers
        return 4 * options.train_batch_size * length * layers * per_token

    def trained_names(self) -> frozenset[str] | None:
        """Names of the parameters that train; None for all."""
        part = self.training.train
        if part != "all":
            return trained_names(self.student, "router" if part == "router" else "experts") - self.packed
        if not self.packed:
            return None
        return frozenset(name for name, _ in self.student.stock.model.named_parameters()) - self.packed


def _bytes(model: Any, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
