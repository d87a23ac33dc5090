"""A student beside its teacher as one module whose forward pass is the distillation loss."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moetools.training.data import IGNORED
from moetools.training.loss import (
    FullTargets,
    Head,
    LossOptions,
    TopTargets,
    distillation_loss,
)
from moetools.training.models import head_of, run_body


class Teacher(Protocol):
    """Where the teacher's distributions come from."""

    def targets(
        self, ids_BN: Tensor, mask_BN: Tensor | None, real_BN: Tensor, number_B: Tensor, *, layers: bool
    ) -> tuple[FullTargets | TopTargets, list[Tensor]]:
        """Targets at the real positions, in row-major order, and hidden states [T, H] of all layers if asked for."""


class OnlineTeacher:
    """The teacher runs beside the student.

    Args:
        vocabulary: the first rows of its head that stand for tokens.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        self.model, self.head = model, head_of(model).first(vocabulary)

    @torch.no_grad()
    def targets(
        self, ids_BN: Tensor, mask_BN: Tensor | None, real_BN: Tensor, number_B: Tensor, *, layers: bool
    ) -> tuple[FullTargets | TopTargets, list[Tensor]]:
        del number_B
        hidden, states = run_body(self.model, ids_BN, mask_BN, layers=layers)
        chosen = [state[real_BN] for state in states] if states is not None else []
        return FullTargets(hidden_TH=hidden[real_BN], head=self.head), chosen


class Distiller(nn.Module):
    """What transformers' Trainer trains.

    The student's body and head run inside this module's forward pass, so that wrappers which gather sharded weights
    around it (FSDP2) see both. The teacher is no submodule: nothing of it is trained, sharded or saved.

    Args:
        teacher: None for the cross-entropy alone.
        vocabulary: the first rows of the student's head that stand for tokens.
        hidden_weight: of the mean over layers of ||h_student - h_teacher||^2 / ||h_teacher||^2 per token.
    """

    accepts_loss_kwargs = True

    def __init__(
        self,
        student: Any,
        teacher: Teacher | None,
        options: LossOptions,
        *,
        vocabulary: int,
        hidden_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.student = student
        # Not an attribute of the module, which would make a teacher's model part of it.
        self.__dict__["_teacher"] = teacher
        self.options, self.vocabulary, self.hidden_weight = options, vocabulary, hidden_weight
        # The Trainer asks for these when it loads a checkpoint that holds tied weights once.
        self._keys_to_ignore_on_save = [f"student.{name}" for name in student.all_tied_weights_keys]

    @property
    def teacher(self) -> Teacher | None:
        """Where the targets come from."""
        return self.__dict__["_teacher"]

    def tie_weights(self) -> None:
        """Make tied weights one again."""
        self.student.tie_weights(recompute_mapping=False)

    def forward(
        self,
        input_ids: Tensor,
        shift_labels: Tensor,
        number: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """Loss per predicted token, and the sums it is made of.

        Args:
            num_items_in_batch: predicted tokens of the whole optimizer step; None for those of this batch.
        """
        del labels
        real_BN = shift_labels != IGNORED
        matched = self.hidden_weight > 0 and self.teacher is not None
        hidden, states = run_body(self.student, input_ids, attention_mask, layers=matched)
        targets: FullTargets | TopTargets | None = None
        meant: list[Tensor] = []
        if self.teacher is not None:
            targets, meant = self.teacher.targets(input_ids, attention_mask, real_BN, number, layers=matched)
        head: Head = head_of(self.student).first(self.vocabulary)
        sums = distillation_loss(hidden[real_BN], head, shift_labels[real_BN], targets, self.options)
        total = sums.total
        if matched:
            total = total + self.hidden_weight * hidden_distance([state[real_BN] for state in states], meant)
        tokens = real_BN.sum()
        return {
            "loss": total / (tokens if num_items_in_batch is None else num_items_in_batch),
            "cross_entropy": sums.cross_entropy.detach(),
            "divergence": sums.divergence.detach(),
            "tokens": tokens,
        }


def hidden_distance(states: list[Tensor], meant: list[Tensor]) -> Tensor:
    """Sum over tokens of the mean over layers of ||h - h'||^2 / ||h'||^2, h' the teacher's.

    A student with fewer layers is compared at evenly spaced ones; the embeddings in front are left out.
    """
    layers, all_layers = len(states) - 1, len(meant) - 1
    total = states[0].new_zeros(())
    for place in range(1, layers + 1):
        other = meant[round(place * all_layers / layers)]
        total = total + ((states[place] - other).square().sum(-1) / other.square().sum(-1).clamp_min(1e-12)).sum()
    return total / layers
