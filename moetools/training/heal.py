"""Healing: a short training of a compressed model's routers, or routers and experts, against the original's logits."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.errors import DataError, UserError, VerificationError
from moetools.forward.evaluate import check_vocabulary
from moetools.forward.memory import default_budget, module_bytes
from moetools.forward.progress import Progress, Silent
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.forward.tokens import TokenData, pad_right
from moetools.sizes import format_bytes
from moetools.training.divergence import kl_divergence
from moetools.training.parameters import Student, Train, load_teacher, split_fields, trained_names

_HELD_OUT_SHARE, _HELD_OUT_MOST = 0.1, 32
_CHECKS = 5
_WARM_UP_SHARE = 0.1
_MAX_NORM = 1.0
LEARNING_RATES: dict[Train, float] = {"router": 0.03, "router+experts": 0.006}
"""Relative steps that healed most in 80 to 200 steps (docs/benchmarks.md)."""


@dataclass(frozen=True, kw_only=True)
class HealResult:
    """What a training brought.

    Attributes:
        routers: per MoE layer the router's fields of `LayerWeights` (router_ED, router_bias_E, correction_bias_E as far
            as present), in the student's dtype on disk.
        experts: per MoE layer all other fields; empty unless experts were trained.
        curve: (step, mean KL in nats per token on held-out sequences), of the weights rounded as on disk; step 0 is the
            start.
        best_step: the step whose weights are returned; 0 if nothing helped.
        steps: steps made; fewer than asked for if the loss or its gradient was not finite.
        seconds: wall time, loading included.
        cached: whether the teacher ran once, its logits kept in fp16, instead of beside every step.
    """

    routers: dict[int, dict[str, Tensor]]
    experts: dict[int, dict[str, Tensor]]
    curve: list[tuple[int, float]]
    best_step: int
    steps: int
    seconds: float
    cached: bool


def heal_routers(
    teacher: Checkpoint,
    student: Checkpoint,
    data: TokenData,
    forward: ForwardOptions,
    *,
    steps: int,
    train: Train = "router",
    learning_rate: float | None = None,
    temperature: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> HealResult:
    """Train the routers of `student` towards the next-token distributions of `teacher`.

    Loss: mean over real tokens of tau^2 KL(softmax(teacher / tau) || softmax(student / tau)) over the whole vocabulary
    (Hinton et al. 2015, arXiv 1503.02531; routers only: Router KD, METHODS.md). AdamW without weight decay, gradient
    clipped to norm 1, linear warm-up over 10 % of the steps, cosine decay to zero. A tenth of the sequences, at most
    32, is held out; of the start and five points on the way the weights with the least held-out KL, measured as they
    will lie on disk, are returned: on those sequences the result is never worse than the start.

    Args:
        steps: optimizer steps, each on `batch_size` sequences; epochs follow one another in seeded random order.
        train: "router" trains router rows and biases, "router+experts" the experts' projections and biases as well.
            Correction biases get no gradient and stay as they are.
        learning_rate: step relative to the root mean square of each tensor, of which routers take 5 times as much; None
            is .03 for routers alone and .006 with experts.
        temperature: tau.

    Raises:
        UserError: an option out of range, models of different vocabularies, or a memory budget that holds neither both
            models nor the student and the cached logits.
        DataError: fewer than 2 sequences.
        VerificationError: the student's KL is not finite before any step.
    """
    started = time.monotonic()
    learning_rate = LEARNING_RATES[train] if learning_rate is None else learning_rate
    _check_options(steps, learning_rate, temperature, batch_size)
    teachers, students = StreamedModel(teacher, forward), StreamedModel(student, forward)
    check_vocabulary(teachers, students)
    schedule, plan = check_memory(teachers, students, data, steps=steps, train=train, batch_size=batch_size, seed=seed)
    targets = _Targets(teachers, schedule, cached=plan.cached, rows=plan.rows, progress=progress or Silent())
    run = _Healing(Student(students, train), targets, schedule, plan.rows, temperature, progress or Silent())
    run.train(learning_rate)
    fields = {index: split_fields(found) for index, found in run.student.canonical(run.best).items()}
    return HealResult(
        routers={index: router for index, (router, _) in fields.items()},
        experts={index: experts for index, (_, experts) in fields.items() if experts},
        curve=run.curve,
        best_step=run.best_step,
        steps=run.steps,
        seconds=time.monotonic() - started,
        cached=plan.cached,
    )


def check_memory(
    teacher: StreamedModel,
    student: StreamedModel,
    data: TokenData,
    *,
    steps: int,
    train: Train,
    batch_size: int = 8,
    seed: int = 0,
) -> tuple[_Schedule, HealMemory]:
    """What a training would run on and where its memory would go; reads no weights.

    Raises:
        UserError, DataError: see `heal_routers`.
    """
    schedule = _schedule(data, steps, batch_size, seed)
    plan = plan_memory(teacher, student, schedule, train, batch_size)
    plan.check()
    return schedule, plan


@dataclass(frozen=True, kw_only=True)
class HealMemory:
    """What a training keeps in memory, in bytes.

    Attributes:
        budget: the bound.
        teacher, student: weights in the compute dtype.
        training: gradients, AdamW's two moments, fp32 masters and the best weights so far.
        cache: the teacher's logits of all sequences used, fp16.
        row: activations of one sequence of the longest length, forward and backward (an estimate).
        batch_size: sequences per step.
    """

    budget: int
    teacher: int
    student: int
    training: int
    cache: int
    row: int
    batch_size: int

    @property
    def cached(self) -> bool:
        """Whether the teacher can run first and be freed, its logits kept."""
        return self.cache + self._models(True) + self.row <= self.budget

    @property
    def rows(self) -> int:
        """Sequences that go through the models together; a step adds up as many as it takes."""
        free = self.budget - self._models(self.cached) - (self.cache if self.cached else 0)
        return max(1, min(self.batch_size, free // self.row))

    def _models(self, cached: bool) -> int:
        trained = self.student + self.training
        return max(self.teacher, trained) if cached else self.teacher + trained

    def check(self) -> None:
        """Refuse a budget that neither way of training fits.

        Raises:
            UserError: with the numbers.
        """
        together = self._models(False) + self.row
        if self.cached or together <= self.budget:
            return
        raise UserError(
            f"memory budget {format_bytes(self.budget)} is too small to heal: teacher {format_bytes(self.teacher)}, "
            f"student {format_bytes(self.student)}, its training {format_bytes(self.training)} and one sequence "
            f"{format_bytes(self.row)} need {format_bytes(together)} together, or "
            f"{format_bytes(self.cache + self._models(True) + self.row)} with the teacher's logits kept",
            hint="raise --memory-budget, shorten --seq-len, or train with 'moetools distill'",
        )


def plan_memory(
    teacher: StreamedModel, student: StreamedModel, schedule: _Schedule, train: Train, batch_size: int
) -> HealMemory:
    """Where the bytes of a training go, known before any weight is read."""
    names = [name for index in student.stock.moe_layers for name in trained_names(student, index, train)]
    trained = sum(student.stock.model.get_parameter(name).numel() for name in names)
    # fp32 gradient, two moments and the copy while rounding; masters and the best weights on top.
    per_parameter = 4 * 4 + 4 + (0 if student.dtype == torch.float32 else 4 + student.dtype.itemsize)
    config = student.stock.model.config.get_text_config()
    length = max(len(ids) for ids in schedule.sequences)
    shape = student.layer_shape(1)
    per_token = 16 * student.hidden_size + shape.top_k * (5 * shape.expert_size + 4 * student.hidden_size)
    scores = 2 * config.num_attention_heads * length
    head = 3 * student.vocab_size
    budget = student.options.memory_budget
    return HealMemory(
        budget=default_budget(student.device) if budget is None else budget,
        teacher=module_bytes(teacher.stock.model, teacher.dtype),
        student=module_bytes(student.stock.model, student.dtype),
        training=trained * per_parameter,
        cache=2 * student.vocab_size * sum(len(schedule.sequences[number]) for number in schedule.used),
        row=4 * length * (student.num_layers * (per_token + scores) + head),
        batch_size=batch_size,
    )


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    """All sequences without padding, those held out, and those of each step."""

    sequences: list[Tensor]
    held_out: list[int]
    steps: list[list[int]]

    @property
    def used(self) -> list[int]:
        return sorted({*self.held_out, *(number for step in self.steps for number in step)})


def _schedule(data: TokenData, steps: int, batch_size: int, seed: int) -> _Schedule:
    sequences: list[Tensor] = []
    for batch in data.batches:
        masks = [None] * len(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        sequences += [ids if mask is None else ids[mask] for ids, mask in zip(batch.input_ids, masks, strict=True)]
    if len(sequences) < 2:
        raise DataError(f"healing needs at least 2 sequences, {len(sequences)} given", hint="use more text")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    held_out = max(1, min(_HELD_OUT_MOST, round(_HELD_OUT_SHARE * len(sequences))))
    training = torch.tensor(order[held_out:])
    drawn: list[int] = []
    while len(drawn) < steps * batch_size:
        drawn += training[torch.randperm(len(training), generator=generator)].tolist()
    batches = [drawn[start : start + batch_size] for start in range(0, steps * batch_size, batch_size)]
    return _Schedule(sequences=sequences, held_out=sorted(order[:held_out]), steps=batches)


class _Targets:
    """The teacher's logits at the real tokens of some sequences: from a cache, or computed when asked for."""

    def __init__(
        self, streamed: StreamedModel, schedule: _Schedule, *, cached: bool, rows: int, progress: Progress
    ) -> None:
        self._sequences, self._device = schedule.sequences, streamed.device
        self._cache: dict[int, Tensor] = {}
        self._model: Any = load_teacher(streamed)
        if not cached:
            return
        used = schedule.used
        progress.start("running the original", layers=1, tokens=sum(len(self._sequences[one]) for one in used))
        progress.layer(0)
        try:
            for numbers in _split(used, rows):
                self._keep(numbers)
                progress.advance(sum(len(self._sequences[number]) for number in numbers))
        finally:
            progress.stop()
        self._model = None
        for index in range(streamed.num_layers):
            streamed.stock.free_layer(index)
        streamed.stock.model.to("meta")
        gc.collect()

    def _keep(self, numbers: Sequence[int]) -> None:
        logits_TV = self._compute(numbers)
        # Next to 0, where the likely tokens then are, fp16 is most precise.
        logits_TV = (logits_TV - logits_TV.amax(-1, keepdim=True)).half()
        lengths = [len(self._sequences[number]) for number in numbers]
        for number, part in zip(numbers, logits_TV.split(lengths), strict=True):
            self._cache[number] = part.clone()

    def _compute(self, numbers: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return run_sequences(self._model, [self._sequences[number] for number in numbers], self._device)

    def logits(self, numbers: Sequence[int]) -> Tensor:
        """[T, V], the sequences' tokens one after the other."""
        if self._model is not None:
            return self._compute(numbers)
        return torch.cat([self._cache[number] for number in numbers])


class _Healing:
    """The loop: after `train`, `best` are the weights to return."""

    def __init__(
        self,
        student: Student,
        targets: _Targets,
        schedule: _Schedule,
        rows: int,
        temperature: float,
        progress: Progress,
    ) -> None:
        self.student, self.targets, self.schedule = student, targets, schedule
        self.rows, self.temperature, self.progress = rows, temperature, progress
        self.curve: list[tuple[int, float]] = []
        self.best: Mapping[str, Tensor] = {}
        self.best_step = self.steps = 0

    def train(self, learning_rate: float) -> None:
        steps = len(self.schedule.steps)
        self._check_point()
        if not math.isfinite(self.curve[0][1]):
            raise VerificationError(
                f"{self.student.streamed.checkpoint.path}: its KL from the original is not finite",
                hint="the weights are damaged, or the compute dtype overflows: try --dtype float32",
            )
        groups = self.student.groups(learning_rate)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        rates = [group["lr"] for group in groups]
        every = max(1, steps // _CHECKS)
        tokens = sum(len(self.schedule.sequences[number]) for step in self.schedule.steps for number in step)
        self.progress.start("healing", layers=1, tokens=tokens)
        self.progress.layer(0)
        try:
            for step, numbers in enumerate(self.schedule.steps, start=1):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * learning_rate_factor(step, steps)
                if not self._step(optimizer, numbers):
                    break
                self.steps = step
                self.progress.advance(sum(len(self.schedule.sequences[number]) for number in numbers))
                if step % every == 0 and steps - step >= every:
                    self._check_point()
            if self.curve[-1][0] != self.steps:
                self._check_point()
        finally:
            self.progress.stop()

    def _step(self, optimizer: torch.optim.Optimizer, numbers: Sequence[int]) -> bool:
        """One update; false, and nothing changed, if the gradient is not finite."""
        optimizer.zero_grad()
        tokens = sum(len(self.schedule.sequences[number]) for number in numbers)
        for part in _split(numbers, self.rows):
            loss = self._kl(part, self.temperature).sum() / tokens
            loss.backward()
        self.student.gather()
        norm = torch.nn.utils.clip_grad_norm_(self.student.masters.values(), _MAX_NORM)
        if not bool(norm.isfinite()):
            return False
        optimizer.step()
        self.student.scatter()
        return True

    def _check_point(self) -> None:
        """Held-out KL of the weights as they would lie on disk; the best so far are kept."""
        with self.student.as_stored() as stored, torch.no_grad():
            parts = [self._kl(part, 1.0) for part in _split(self.schedule.held_out, self.rows)]
            kl = torch.cat(parts).double().mean().item()
            if not self.curve or kl < min(value for _, value in self.curve):
                self.best, self.best_step = stored, self.steps
        self.curve.append((self.steps, kl))

    def _kl(self, numbers: Sequence[int], temperature: float) -> Tensor:
        sequences = [self.schedule.sequences[number] for number in numbers]
        student_TV = run_sequences(self.student.model, sequences, self.student.streamed.device)
        return kl_divergence(self.targets.logits(numbers), student_TV, temperature=temperature)


def run_sequences(model: Any, sequences: Sequence[Tensor], device: torch.device) -> Tensor:
    """[T, V] logits at the real tokens, one sequence after the other."""
    ids_BN, mask_BN = pad_right(sequences, 0)
    ids_BN = ids_BN.to(device)
    if mask_BN is None:
        return model(input_ids=ids_BN, use_cache=False).logits.flatten(0, 1)
    mask_BN = mask_BN.to(device)
    return model(input_ids=ids_BN, attention_mask=mask_BN.long(), use_cache=False).logits[mask_BN]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 10 % of the steps, then half a cosine that would be zero after the last step.

    Args:
        step: 1 for the first.
    """
    warm_up = max(1, round(_WARM_UP_SHARE * steps))
    if step <= warm_up:
        return step / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up + 1)))


def _split(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _check_options(steps: int, learning_rate: float, temperature: float, batch_size: int) -> None:
    for name, value in (("steps", steps), ("batch size", batch_size)):
        if value < 1:
            raise UserError(f"{name} {value} is below 1")
    for name, number in (("learning rate", learning_rate), ("temperature", temperature)):
        if not 0 < number < math.inf:
            raise UserError(f"{name} {number} is not a positive number")
