"""Which task a prompt belongs to: a linear classifier on hashed token n-grams, or on the routers' probabilities.

Letters: S prompts, X features, G tasks.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from moetools.checkpoint.tensor_file import open_tensor_file
from moetools.errors import CheckpointError, UserError

Kind = Literal["ngrams", "router"]
_BUCKETS = 4096
_LONGEST = 2
_FORMAT = "moetools-task-classifier-1"


@dataclass(frozen=True, kw_only=True)
class TaskClassifier:
    """P(task | prompt) = softmax(weight_GX x + bias_G), x the prompt's features less their mean, over their spread.

    Attributes:
        kind: "ngrams" needs the token ids alone, "router" a forward pass over the prefix.
        tasks: names, in the order of the rows.
        prefix: tokens of the prompt that count.
        threshold: a prompt whose most likely task is less likely than this gets none, and so all experts.
    """

    kind: Kind
    tasks: tuple[str, ...]
    prefix: int
    threshold: float
    weight_GX: Float[Tensor, "G X"]
    bias_G: Float[Tensor, "G"]
    mean_X: Float[Tensor, "X"]
    spread_X: Float[Tensor, "X"]

    def probabilities(self, features_SX: Float[Tensor, "S X"]) -> Float[Tensor, "S G"]:
        """P(task | prompt) of every prompt, fp64."""
        if features_SX.shape[1] != len(self.mean_X):
            message = f"the task classifier takes {len(self.mean_X)} features, this model gives {features_SX.shape[1]}"
            raise CheckpointError(message, hint="write it again with moetools route-tasks")
        scaled_SX = (features_SX.double().cpu() - self.mean_X) / self.spread_X
        return (scaled_SX @ self.weight_GX.T + self.bias_G).softmax(1)

    def choose(self, features_SX: Float[Tensor, "S X"]) -> list[str | None]:
        """The task of every prompt; None below the threshold."""
        best = self.probabilities(features_SX).max(1)
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [self.tasks[task] if sure >= self.threshold else None for sure, task in pairs]

    def save(self, file: Path) -> None:
        """Write coefficients as safetensors, all else as its metadata; nothing in the file is code."""
        facts = {"kind": self.kind, "tasks": list(self.tasks), "prefix": self.prefix, "threshold": self.threshold}
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        save_file(tensors, str(file), metadata={"format": _FORMAT, "facts": json.dumps(facts)})


_TENSORS = ("weight_GX", "bias_G", "mean_X", "spread_X")


def load_classifier(file: Path) -> TaskClassifier:
    """A classifier saved by `TaskClassifier.save`.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """
    stored = open_tensor_file(file)
    if stored.metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{file} is not a task classifier", hint="write one with moetools route-tasks")
    try:
        facts: dict[str, Any] = json.loads(stored.metadata["facts"])
        found = TaskClassifier(**{**facts, "tasks": tuple(facts["tasks"]), **stored.read(_TENSORS)})
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as a task classifier: {error}") from error
    if not _is_sound(found):
        raise CheckpointError(f"{file} is damaged: its numbers do not go together", hint="write it again")
    return found


def _is_sound(found: TaskClassifier) -> bool:
    """Whether types, shapes and values are those that `fit_classifier` gives."""
    features = found.mean_X.shape[-1] if found.mean_X.dim() else 0
    shapes = {"weight_GX": (len(found.tasks), features), "bias_G": (len(found.tasks),), "mean_X": (features,)}
    tensors = {name: getattr(found, name) for name in _TENSORS}
    return (
        found.kind in get_args(Kind)
        and all(isinstance(task, str) for task in found.tasks)
        and type(found.prefix) is int
        and 1 <= found.prefix < 2**31
        and type(found.threshold) in (int, float)
        and 0 <= found.threshold <= 1
        and all(tuple(tensors[name].shape) == shape for name, shape in {**shapes, "spread_X": (features,)}.items())
        and all(one.dtype == torch.float64 and bool(torch.isfinite(one).all()) for one in tensors.values())
        and bool((found.spread_X > 0).all())
    )


def check_classifier(kind: str, prefix: int, threshold: float) -> None:
    """Refuse settings that cannot work.

    Raises:
        UserError: an unknown kind, a prefix below 1, or a threshold outside [0, 1].
    """
    if kind not in ("none", *get_args(Kind)):
        raise UserError(f"`classifier={kind}` is unknown; legal: none, {', '.join(get_args(Kind))}")
    if prefix < 1:
        raise UserError(f"`prefix={prefix}` is below 1")
    if not 0 <= threshold <= 1:
        raise UserError(f"`threshold={threshold}` is not between 0 and 1")


def ngram_features(prompts: Sequence[Int[Tensor, "N"]], prefix: int) -> Float[Tensor, "S X"]:
    """Share of each prompt's one- and two-token runs in each of 4,096 buckets.

    A run of ids (a, b) falls into bucket ((a + 1) * 2654435761 + (b + 1) * 40503) mod 2^32, shifted right by 20; a
    single token counts as (a, -1).
    """
    features_SX = torch.zeros(len(prompts), _BUCKETS, dtype=torch.float64)
    for row, ids in enumerate(prompts):
        known = ids[:prefix].long().cpu()
        runs = [_bucket(known, torch.full_like(known, -1))]
        if _LONGEST > 1 and len(known) > 1:
            runs.append(_bucket(known[:-1], known[1:]))
        buckets = torch.cat(runs)
        features_SX[row].index_add_(0, buckets, torch.full((len(buckets),), 1 / max(1, len(buckets))).double())
    return features_SX


def _bucket(first: Tensor, second: Tensor) -> Tensor:
    return (((first + 1) * 2654435761 + (second + 1) * 40503) % 2**32) >> 20


@dataclass(frozen=True, kw_only=True)
class ClassifierReport:
    """How well held-out prompts are told apart.

    Attributes:
        prompts: held-out prompts.
        accuracy: share whose most likely task is right, threshold or not.
        confident: share above the threshold; the others run with all experts.
        accuracy_confident: share of those that are right; None if there are none.
        confusion: true task -> chosen task or "full routing" -> prompts.
    """

    kind: str
    prefix: int
    threshold: float
    prompts: int
    accuracy: float
    confident: float
    accuracy_confident: float | None
    confusion: dict[str, dict[str, int]]


FALL_BACK = "full routing"


def fit_classifier(
    kind: Kind,
    tasks: tuple[str, ...],
    features_SX: Float[Tensor, "S X"],
    task_S: Int[Tensor, "S"],
    *,
    prefix: int,
    threshold: float,
) -> TaskClassifier:
    """Multinomial logistic regression (scikit-learn, L2 with C = 1, tasks weighted evenly)."""
    from sklearn.linear_model import LogisticRegression

    mean_X = features_SX.mean(0)
    spread_X = features_SX.std(0, correction=0)
    # A feature that never varies says nothing; one that hardly does must not be blown up.
    spread_X = spread_X.clamp(min=max(1e-12, 0.05 * spread_X.max().item()))
    model = LogisticRegression(C=1.0, max_iter=1000, class_weight="balanced")
    model.fit(((features_SX - mean_X) / spread_X).numpy(), task_S.numpy())
    weight_GX, bias_G = torch.from_numpy(model.coef_).double(), torch.from_numpy(model.intercept_).double()
    if len(tasks) == 2:
        # scikit-learn keeps one row for two classes: the log odds of the second.
        weight_GX = torch.cat([torch.zeros_like(weight_GX), weight_GX])
        bias_G = torch.cat([torch.zeros_like(bias_G), bias_G])
    return TaskClassifier(
        kind=kind,
        tasks=tasks,
        prefix=prefix,
        threshold=threshold,
        weight_GX=weight_GX,
        bias_G=bias_G,
        mean_X=mean_X,
        spread_X=spread_X,
    )


def judge_classifier(
    classifier: TaskClassifier, features_SX: Float[Tensor, "S X"], task_S: Int[Tensor, "S"]
) -> ClassifierReport:
    """Accuracy on prompts the classifier was not fitted to."""
    best = classifier.probabilities(features_SX).max(1)
    right_S = best.indices == task_S
    sure_S = best.values >= classifier.threshold
    confusion: dict[str, dict[str, int]] = {
        task: dict.fromkeys((*classifier.tasks, FALL_BACK), 0) for task in classifier.tasks
    }
    for true, choice in zip(task_S.tolist(), classifier.choose(features_SX), strict=True):
        confusion[classifier.tasks[true]][choice or FALL_BACK] += 1
    sure: Any = right_S[sure_S].double()
    return ClassifierReport(
        kind=classifier.kind,
        prefix=classifier.prefix,
        threshold=classifier.threshold,
        prompts=len(task_S),
        accuracy=right_S.double().mean().item(),
        confident=sure_S.double().mean().item(),
        accuracy_confident=sure.mean().item() if len(sure) else None,
        confusion=confusion,
    )


def router_features(probability_SLE: Sequence[Float[Tensor, "S E"]]) -> Float[Tensor, "S X"]:
    """Mean router probability of every expert over the prefix, layer after layer."""
    return torch.cat([layer_SE.double() for layer_SE in probability_SLE], 1)
