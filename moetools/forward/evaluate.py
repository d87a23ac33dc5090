"""Perplexity, exact KL to a reference, multiple choice, size and speed of models that run on the same tokens.

Every model goes through its layers once, all texts and all multiple-choice items together. The hidden states behind the
last layer are kept, and the logits of reference and model are then computed side by side, some rows at a time, so that
[tokens, vocabulary] never exists as a whole.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moetools.architectures.base import Architecture
from moetools.checkpoint.reader import Checkpoint
from moetools.errors import DataError, UserError, VerificationError
from moetools.forward.activations import Activations
from moetools.forward.head import head_rows, row_logits
from moetools.forward.memory import MemoryPlan, peak_memory
from moetools.forward.metrics import (
    ChoiceMetrics,
    ModelMetrics,
    ModelSize,
    TaskMetrics,
    TokenScores,
    accuracy_metrics,
    agreement,
    geometric_mean,
    join_scores,
    over_tasks,
    score_rows,
)
from moetools.forward.progress import announced
from moetools.forward.streaming import StreamedModel
from moetools.text.choices import ChoiceBatch, ChoiceSet
from moetools.text.tokens import TokenBatch, TokenData

_HEAD_COPIES = 6


@dataclass(frozen=True, kw_only=True)
class ChoiceData:
    """A multiple-choice set and its batches (`choice_batches`)."""

    choices: ChoiceSet
    batches: tuple[ChoiceBatch, ...]


def compare(
    reference: StreamedModel,
    models: Mapping[str, StreamedModel],
    data: TokenData | None,
    *,
    choices: Sequence[ChoiceData] = (),
    reference_name: str = "reference",
) -> dict[str, ModelMetrics]:
    """Metrics of the reference (first) and of every model, each run once over the same tokens.

    Raises:
        UserError: a model with another vocabulary, or a memory budget that is too small.
        VerificationError: a model whose logits are not finite.
    """
    for model in models.values():
        check_vocabulary(reference, model)
    evaluator = Evaluator(data, choices=choices, reference=reference)
    for model in (reference, *models.values()):
        evaluator.plan(model).check()
    measured = {name: evaluator.measure(model) for name, model in models.items()}
    return {reference_name: evaluator.reference_metrics(), **measured}


def check_vocabulary(reference: StreamedModel, model: StreamedModel) -> None:
    """Refuse two models that do not predict the same tokens.

    Raises:
        UserError: with both sizes.
    """
    if model.vocab_size != reference.vocab_size:
        raise UserError(
            f"{model.checkpoint.path} predicts {model.vocab_size} tokens, {reference.checkpoint.path} "
            f"{reference.vocab_size}: their distributions cannot be compared",
            hint="compare models of one vocabulary; padding the embeddings changes it too",
        )


def measure_size(checkpoint: Checkpoint, arch: Architecture) -> ModelSize:
    """Size of a checkpoint, from its headers and the files' sizes."""
    counts = {name: math.prod(info.shape) for name, info in checkpoint.tensors.items()}
    return ModelSize(
        experts=arch.num_experts(checkpoint.config) or 0,
        parameters=sum(counts.values()),
        expert_parameters=sum(count for name, count in counts.items() if arch.part_of(name) == "experts"),
        nbytes=sum((checkpoint.path / name).stat().st_size for name in checkpoint.headers),
    )


class Evaluator:
    """Measures models one after the other; at any time it holds the hidden states of the reference and one model.

    Args:
        data: texts for perplexity and KL.
        reference: what models are compared to; it runs once, when the first model is measured.
        plan: of the run this is a part of; that of the evaluation alone if not given.
    """

    def __init__(
        self,
        data: TokenData | None,
        *,
        choices: Sequence[ChoiceData] = (),
        reference: StreamedModel | None = None,
        plan: MemoryPlan | None = None,
    ) -> None:
        self._plan = plan
        self._tasks = data.tasks if data else ()
        self._texts = [_Scored(batch, _target_mask(batch)) for batch in (data.batches if data else ())]
        self._choices = choices
        self._choice_rows = [_Scored(batch.tokens, batch.score_mask) for one in choices for batch in one.batches]
        self._reference = reference
        self._reference_pass: _Pass | None = None
        self._reference_metrics: ModelMetrics | None = None

    def plan(self, model: StreamedModel) -> MemoryPlan:
        """Where the bytes go while `model` is measured: the reference's head and hidden states are there too."""
        if self._plan is not None:
            return self._plan
        batches = self._batches()
        plan = model.memory_plan(batches, rooms=1 if self._reference is None else 2)
        other = 0 if self._reference is None else self._reference.rest_bytes()
        return _with_head(replace(plan, rest=plan.rest + other), model, batches)

    def _batches(self) -> list[TokenBatch]:
        return [scored.tokens for scored in (*self._texts, *self._choice_rows)]

    def measure(self, model: StreamedModel) -> ModelMetrics:
        """All metrics of `model`.

        Raises:
            UserError: another vocabulary than the reference's, or a memory budget that is too small.
            VerificationError: logits that are not finite.
        """
        if self._reference is None:
            alone = self._run(model)
            return self._metrics(alone, self._score([alone])[0], None)
        check_vocabulary(self._reference, model)
        if self._reference_pass is None:
            self._reference_pass = self._run(self._reference)
        compared = self._run(model)
        against, scores = self._score([self._reference_pass, compared])
        if self._reference_metrics is None:
            self._reference_metrics = self._metrics(self._reference_pass, against, against)
        return self._metrics(compared, scores, against)

    def reference_metrics(self) -> ModelMetrics:
        """The reference's own; known once a model was measured."""
        assert self._reference_metrics is not None, "measure a model first"
        return self._reference_metrics

    def _run(self, model: StreamedModel) -> "_Pass":
        plan = self.plan(model)
        plan.check()
        return _run(model, self._batches(), plan)

    def _score(self, passes: Sequence["_Pass"]) -> list[list[TokenScores]]:
        """Scores of each pass for each batch of text."""
        progress = passes[-1].model.progress
        tokens = sum(scored.tokens.num_tokens for scored in self._texts)
        progress.start("comparing" if len(passes) > 1 else "scoring", layers=1, tokens=tokens)
        progress.layer(0)
        results: list[list[TokenScores]] = [[] for _ in passes]
        try:
            for number, scored in enumerate(self._texts):
                for parts, score in zip(results, _score_batch(passes, number, scored), strict=True):
                    parts.append(score)
                progress.advance(scored.tokens.num_tokens)
        finally:
            progress.stop()
        return results

    def _metrics(self, measured: "_Pass", scores: list[TokenScores], against: list[TokenScores] | None) -> ModelMetrics:
        texts = self._per_task(scores)
        references = self._per_task(against) if against is not None else None
        for score in texts.values():
            _refuse_not_finite(measured.model, score)
        tasks = {
            task: TaskMetrics(
                targets=len(score.kl_R),
                perplexity=(-score.log_prob_R.mean()).exp().item(),
                agreement=None if references is None else agreement(score, references[task]),
            )
            for task, score in texts.items()
        }
        choices = self._choice_metrics(measured)
        checkpoint, arch = measured.model.checkpoint, measured.model.arch
        return ModelMetrics(
            size=measure_size(checkpoint, arch),
            tasks=tasks,
            perplexity=geometric_mean([task.perplexity for task in tasks.values()]),
            agreement=None if references is None or not texts else over_tasks(tasks, texts, references),
            choices=choices,
            tokens_per_second=measured.num_tokens / measured.seconds,
            peak_memory=measured.peak_memory,
        )

    def _per_task(self, scores: Sequence[TokenScores]) -> dict[str, TokenScores]:
        parts: dict[str, list[TokenScores]] = {task: [] for task in self._tasks}
        for scored, score in zip(self._texts, scores, strict=True):
            parts[self._tasks[int(scored.tokens.task[0])]].append(score)
        joined = {task: join_scores(found) for task, found in parts.items()}
        for task, score in joined.items():
            if not len(score.kl_R):
                raise DataError(f"task '{task}' has no token to predict: all its sequences have one token")
        return joined

    def _choice_metrics(self, measured: "_Pass") -> dict[str, ChoiceMetrics]:
        number = len(self._texts)
        found = {}
        for one in self._choices:
            log_prob: list[list[float]] = [[0.0] * len(item.choices) for item in one.choices.items]
            for batch in one.batches:
                (score,) = _score_batch([measured], number, _Scored(batch.tokens, batch.score_mask))
                _refuse_not_finite(measured.model, score)
                row_R = batch.score_mask.nonzero()[:, 0]
                sums_B = score.log_prob_R.new_zeros(len(batch.item)).index_add_(0, row_R, score.log_prob_R)
                per_byte = (sums_B / batch.num_bytes).tolist()
                for item, choice, value in zip(batch.item.tolist(), batch.choice.tolist(), per_byte, strict=True):
                    log_prob[item][choice] = value
                number += 1
            found[one.choices.name] = accuracy_metrics(log_prob, [item.answer for item in one.choices.items])
        return found


@dataclass(frozen=True)
class _Scored:
    """A batch and which of its tokens are predicted, [B, N]; never those at position 0."""

    tokens: TokenBatch
    mask: Bool[Tensor, "B N"]


@dataclass(kw_only=True)
class _Pass:
    """A model whose layers have run; `seconds` grows with what its head takes."""

    model: StreamedModel
    activations: Activations
    num_tokens: int
    seconds: float
    peak_memory: int

    def rows(self, number: int, position_R: Tensor) -> Tensor:
        """[R, D] hidden states of batch `number`; positions count through [B, N]."""
        hidden = self.activations[number].flatten(0, 1)
        return hidden.index_select(0, position_R.to(hidden.device)).to(self.model.device)

    def logits(self, token_R: Tensor, hidden_RD: Tensor) -> Tensor:
        """[R, V]."""
        start = _now(self.model.device)
        logits_RV = row_logits(self.model, token_R, hidden_RD)
        self.seconds += _now(self.model.device) - start
        return logits_RV


def _run(model: StreamedModel, batches: Sequence[TokenBatch], plan: MemoryPlan) -> _Pass:
    """All batches through all layers."""
    batches = [model.on_device(batch) for batch in batches]
    num_tokens = sum(batch.num_tokens for batch in batches)
    activations = model.activations(batches, plan)
    task = f"evaluating {model.checkpoint.path.name}"
    try:
        with (
            announced(model, task, num_tokens) as progress,
            torch.inference_mode(),
            peak_memory(model.device) as peak,
        ):
            start = _now(model.device)
            model.embed(batches, activations)
            # Layers that fit stay until the pass is over: freeing each gives memory back that the next asks for again.
            for layer in model.layers(resident=plan.resident, prefetch=plan.prefetch):
                progress.layer(layer.index)
                for number, batch in enumerate(batches):
                    activations[number] = model.run_layer(layer, batch, activations[number])
                    progress.advance(batch.num_tokens)
            seconds = _now(model.device) - start
    finally:
        model.release()
    return _Pass(model=model, activations=activations, num_tokens=num_tokens, seconds=seconds, peak_memory=max(peak))


def _score_batch(passes: Sequence[_Pass], number: int, scored: _Scored) -> list[TokenScores]:
    """Scores of each pass at the predicted tokens of one batch, in row-major order; `passes[0]` is the reference."""
    ids = scored.tokens.input_ids
    target_T = scored.mask.flatten().nonzero()[:, 0]
    results: list[list[TokenScores]] = [[] for _ in passes]
    with torch.inference_mode():
        for target_R in target_T.split(head_rows(passes[0].model.device, passes[0].model.vocab_size)):
            token_R = ids.flatten()[target_R].to(passes[0].model.device)
            # The hidden state that predicts a token is the one before it.
            logits = [one.logits(token_R, one.rows(number, target_R - 1)) for one in passes]
            for parts, score in zip(results, score_rows(logits, token_R), strict=True):
                parts.append(score)
    return [join_scores(parts) for parts in results]


def _with_head(plan: MemoryPlan, model: StreamedModel, batches: Sequence[TokenBatch]) -> MemoryPlan:
    """A plan that has room for logits."""
    most = max((batch.input_ids.numel() for batch in batches), default=0)
    head = _HEAD_COPIES * min(head_rows(model.device, model.vocab_size), most) * model.vocab_size * 4
    return replace(plan, workspace=max(plan.workspace, head))


def likelihoods(
    model: StreamedModel, scored: Sequence[tuple[TokenBatch, Bool[Tensor, "B N"]]]
) -> list[tuple[Float[Tensor, "R"], Bool[Tensor, "R"]]]:
    """(log p, whether it is the most likely one) of the tokens that a mask marks, behind those before them.

    Row-major per batch; position 0 is never marked.

    Raises:
        UserError: the memory budget is too small.
    """
    batches = [batch for batch, _ in scored]
    plan = _with_head(model.memory_plan(batches), model, batches)
    plan.check()
    measured = _run(model, batches, plan)
    found = []
    rows = head_rows(model.device, model.vocab_size)
    with torch.inference_mode():
        for number, (batch, mask_BN) in enumerate(scored):
            parts = []
            for target_R in mask_BN.flatten().nonzero()[:, 0].split(rows):
                token_R = batch.input_ids.flatten()[target_R].to(model.device)
                logits_RV = measured.logits(token_R, measured.rows(number, target_R - 1)).float()
                log_prob_R = logits_RV.log_softmax(1).gather(1, token_R[:, None])[:, 0]
                parts.append((log_prob_R.cpu(), (logits_RV.argmax(1) == token_R).cpu()))
            log_prob, top = zip(*parts, strict=True) if parts else ((torch.empty(0),), (torch.empty(0).bool(),))
            found.append((torch.cat(log_prob), torch.cat(top)))
    return found


def _target_mask(batch: TokenBatch) -> Tensor:
    mask = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask
    # Of a prompt and its completion only the latter is predicted, behind the token that starts the decoder.
    given = 1 + (batch.source or 0)
    return torch.cat([torch.zeros_like(mask[:, :given]), mask[:, given:] & mask[:, given - 1 : -1]], dim=1)


def _refuse_not_finite(model: StreamedModel, scores: TokenScores) -> None:
    bad = int((~(scores.log_prob_R.isfinite() & scores.kl_R.isfinite())).sum())
    if bad:
        raise VerificationError(
            f"{model.checkpoint.path}: {bad} of {len(scores.kl_R)} tokens have a likelihood or KL that is not finite",
            hint="the weights are damaged, or the compute dtype overflows: try `dtype=float32`",
        )


def _now(device: torch.device) -> float:
    """Seconds, after everything queued on a CUDA device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
