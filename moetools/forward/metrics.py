"""What an evaluation measures, and its maths: exact divergence of next-token distributions, perplexity, accuracy.

Letters: R rows (target positions), V vocabulary.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PERCENTILES = ("50", "90", "95", "99", "99.9")


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """p = softmax(logits), in the parts that comparisons need.

    Attributes:
        shifted_RV: logits minus the row's largest, fp32.
        weight_RV: exp(shifted), fp32; p = weight / sum(weight).
        log_sum_R: ln of the sum of the weights, fp64.
        top_R: index of the largest logit, int64.
    """

    shifted_RV: Float[Tensor, "R V"]
    weight_RV: Float[Tensor, "R V"]
    log_sum_R: Float[Tensor, "R"]
    top_R: Int[Tensor, "R"]

    def log_prob(self, target_R: Int[Tensor, "R"]) -> Float[Tensor, "R"]:
        """ln p(target) in nats, fp64."""
        return self.shifted_RV.gather(1, target_R[:, None])[:, 0].double() - self.log_sum_R


def normalise(logits_RV: Float[Tensor, "R V"]) -> Distribution:
    """The distribution of each row of logits; fp32 logits are overwritten."""
    shifted_RV = logits_RV.float()
    largest_R, top_R = shifted_RV.max(dim=1)
    shifted_RV = shifted_RV.sub_(largest_R[:, None])
    weight_RV = shifted_RV.exp()
    return Distribution(
        shifted_RV=shifted_RV, weight_RV=weight_RV, log_sum_R=weight_RV.sum(1).double().log(), top_R=top_R
    )


def divergence(reference: Distribution, model: Distribution) -> Float[Tensor, "R"]:
    """KL(p || q) = sum_v p_v (ln p_v - ln q_v) per row, in nats, fp64; p is the reference's, q the model's.

    Computed as sum_v w_v (x_v - y_v) / sum_v w_v - (ln sum_v w_v - ln sum_v u_v), with x, y the shifted logits and w, u
    their exponentials of reference and model. Equal logits give exactly 0. Nothing is clamped: where p and q are nearly
    equal, fp32 rounding may leave a value of some -1e-7.
    """
    difference_RV = (reference.shifted_RV - model.shifted_RV).mul_(reference.weight_RV)
    mean_R = difference_RV.sum(1).double() / reference.log_sum_R.exp()
    return mean_R - (reference.log_sum_R - model.log_sum_R)


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What was measured at each target position; on the CPU.

    Attributes:
        log_prob_R: ln q(target), nats, fp64.
        kl_R: KL(reference || model), nats, fp64; zeros for the reference itself.
        same_top_R: whether reference and model think the same token most likely.
    """

    log_prob_R: Float[Tensor, "R"]
    kl_R: Float[Tensor, "R"]
    same_top_R: Bool[Tensor, "R"]


def join_scores(parts: Sequence[TokenScores]) -> TokenScores:
    """All positions of `parts`, in order."""
    return TokenScores(
        log_prob_R=torch.cat([part.log_prob_R for part in parts]),
        kl_R=torch.cat([part.kl_R for part in parts]),
        same_top_R=torch.cat([part.same_top_R for part in parts]),
    )


def score_rows(logits: Sequence[Float[Tensor, "R V"]], target_R: Int[Tensor, "R"]) -> list[TokenScores]:
    """Scores of several models on the same rows; `logits[0]` is the reference's. The logits are overwritten."""
    reference = normalise(logits[0])
    results = []
    for rows_RV in logits:
        model = reference if rows_RV is logits[0] else normalise(rows_RV)
        kl_R = torch.zeros_like(model.log_sum_R) if model is reference else divergence(reference, model)
        results.append(
            TokenScores(
                log_prob_R=model.log_prob(target_R).cpu(),
                kl_R=kl_R.cpu(),
                same_top_R=(model.top_R == reference.top_R).cpu(),
            )
        )
    return results


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How close a model is to its reference.

    Attributes:
        kl: mean KL(reference || model), nats per token.
        kl_percentiles: percentile, as written in `PERCENTILES` -> nats; linear between neighbouring tokens.
        kl_max: the worst token, nats.
        top1: share of positions with the same most likely token, 0 to 1.
        correlation: Pearson's r of the two models' ln p(target); None where one of them does not vary.
    """

    kl: float
    kl_percentiles: dict[str, float]
    kl_max: float
    top1: float
    correlation: float | None


def agreement(scores: TokenScores, reference: TokenScores) -> Agreement:
    """Agreement over all positions of `scores`."""
    found = np.percentile(scores.kl_R.numpy(), [float(percentile) for percentile in PERCENTILES])
    return Agreement(
        kl=scores.kl_R.mean().item(),
        kl_percentiles=dict(zip(PERCENTILES, found.tolist(), strict=True)),
        kl_max=scores.kl_R.max().item(),
        top1=scores.same_top_R.double().mean().item(),
        correlation=correlation(scores.log_prob_R, reference.log_prob_R),
    )


def correlation(x_R: Float[Tensor, "R"], y_R: Float[Tensor, "R"]) -> float | None:
    """Pearson's r = cov(x, y) / (std(x) std(y)); None where x or y does not vary."""
    x_R, y_R = x_R - x_R.mean(), y_R - y_R.mean()
    spread = (x_R.square().sum() * y_R.square().sum()).sqrt().item()
    return (x_R * y_R).sum().item() / spread if spread > 0 else None


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What a checkpoint weighs.

    Attributes:
        experts: routed experts per MoE layer.
        parameters: numbers in all tensors on disk.
        expert_parameters: those of routed experts.
        nbytes: size of the weight files.
    """

    experts: int
    parameters: int
    expert_parameters: int
    nbytes: int

    @property
    def bits_per_parameter(self) -> float:
        """8 * nbytes / parameters; everything on disk counts."""
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True, kw_only=True)
class TaskMetrics:
    """One task.

    Attributes:
        targets: tokens that were predicted: all real tokens but the first of each sequence.
        perplexity: exp(-mean ln p(target)).
        agreement: with the reference, if there is one.
    """

    targets: int
    perplexity: float
    agreement: Agreement | None


@dataclass(frozen=True, kw_only=True)
class ChoiceMetrics:
    """One multiple-choice set.

    Attributes:
        items: their number n.
        accuracy: share a of items whose true choice has the highest log-likelihood per byte; ties go to the first.
        standard_error: sqrt(a (1 - a) / n).
    """

    items: int
    accuracy: float
    standard_error: float


@dataclass(frozen=True, kw_only=True)
class ModelMetrics:
    """Everything measured on one model.

    Attributes:
        perplexity: geometric mean over tasks; None without texts.
        agreement: mean KL, top-1 and correlation are means over tasks; percentiles and maximum are over the tokens of
            all tasks together. None without texts or without a reference.
        tokens_per_second: real tokens (choices included) per second of this model's layers and head, loading included.
        peak_memory: bytes, while this model's layers ran: resident memory of the process; allocated by torch on CUDA.
    """

    size: ModelSize
    tasks: Mapping[str, TaskMetrics]
    perplexity: float | None
    agreement: Agreement | None
    choices: Mapping[str, ChoiceMetrics]
    tokens_per_second: float
    peak_memory: int


def over_tasks(
    tasks: Mapping[str, TaskMetrics], scores: Mapping[str, TokenScores], references: Mapping[str, TokenScores]
) -> Agreement:
    """Mean KL, top-1 and correlation over tasks; percentiles and maximum over the tokens of all tasks together."""
    found = [task.agreement for task in tasks.values() if task.agreement]
    pooled = agreement(join_scores(list(scores.values())), join_scores(list(references.values())))
    correlations = [one.correlation for one in found if one.correlation is not None]
    return dataclasses.replace(
        pooled,
        kl=math.fsum(one.kl for one in found) / len(found),
        top1=math.fsum(one.top1 for one in found) / len(found),
        correlation=math.fsum(correlations) / len(correlations) if len(correlations) == len(found) else None,
    )


def accuracy_metrics(score: Sequence[Sequence[float]], answers: Sequence[int]) -> ChoiceMetrics:
    """Accuracy from ln p(choice) per byte of each item's choices, and the true ones' indices."""
    right = sum(row.index(max(row)) == answer for row, answer in zip(score, answers, strict=True))
    accuracy = right / len(answers)
    return ChoiceMetrics(
        items=len(answers),
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / len(answers)),
    )


def geometric_mean(values: Sequence[float]) -> float | None:
    """exp(mean ln value); None without values."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None
