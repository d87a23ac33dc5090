"""How a student is trained: the settings of the loop, and how many steps they come to. Imports no torch."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetools.arguments import TRAINING, option
from moetools.errors import UserError

if TYPE_CHECKING:
    from moetools.training.loss import LossOptions

PARTS = ("router", "experts", "all")
BASELINES = ("scratch", "student")
DIVERGENCES = ("forward", "reverse", "jsd")
_TEACHER = "Teacher's predictions"
_MOST_EPOCHS = 1000


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a student is trained; nothing is trained without steps, epochs or minutes, and the first of them ends it."""

    steps: int | None = option(None, "Optimizer steps.", metavar="N", panel=TRAINING)
    epochs: float | None = option(None, "Passes over the text.", metavar="N", panel=TRAINING)
    max_minutes: float | None = option(
        None,
        "Wall time of the training; the learning rate falls to zero in it.",
        metavar="N",
        panel=TRAINING,
    )
    train: str = option(
        "all",
        "all; or of a Mixture-of-Experts student router, or experts (routers and experts).",
        metavar="WHAT",
        panel=TRAINING,
        choices=lambda: PARTS,
    )
    train_batch_size: int = option(8, "Sequences per process and forward pass.", metavar="N", panel=TRAINING)
    accumulate: int = option(1, "Forward passes per optimizer step.", metavar="N", panel=TRAINING)
    learning_rate: float = option(1e-3, "Of AdamW.", metavar="R", panel=TRAINING)
    relative_rate: bool = option(
        False,
        "The learning rate counts in root mean squares of each tensor.",
        flags="--relative-rate/--absolute-rate",
        panel=TRAINING,
    )
    weight_decay: float = option(0.0, "Of AdamW, for matrices.", metavar="R", panel=TRAINING)
    alpha: float = option(
        0.0, "Loss: A * cross-entropy + (1 - A) * divergence from the teacher.", metavar="A", panel=TRAINING
    )
    temperature: float = option(1.0, "Of the divergence.", metavar="T", panel=TRAINING)
    divergence: str = option(
        "forward", "forward KL, reverse KL or jsd.", metavar="NAME", panel=TRAINING, choices=lambda: DIVERGENCES
    )
    hidden_weight: float = option(0.0, "Weight of the distance of hidden states.", metavar="R", panel=TRAINING)
    bf16: bool = option(False, "Compute in bfloat16; weights and optimizer stay float32.", panel=TRAINING)
    gradient_checkpointing: bool = option(False, "Recompute activations instead of keeping them.", panel=TRAINING)
    fsdp: bool = option(False, "Shard the student over all processes (FSDP2); use torchrun.", panel=TRAINING)
    log_every: int = option(10, "Steps between lines of `out`/metrics.jsonl.", metavar="N", panel=TRAINING)
    save_every: int = option(
        0, "Steps between checkpoints that `resume` goes on from; 0 for none.", metavar="N", panel=TRAINING
    )
    tensorboard: Path | None = option(
        None,
        "Also write event files there (extra: tensorboard).",
        metavar="DIR",
        panel=TRAINING,
        path="writes",
    )
    train_baseline: str | None = option(
        None,
        "Also train without the teacher for the same steps, from random weights (scratch) or the same student "
        "(student), and report the share of the sparse gain kept.",
        metavar="START",
        panel=TRAINING,
        choices=lambda: BASELINES,
    )
    teacher_cache: Path | None = option(
        None,
        "Capture the teacher's most likely tokens there, layer by layer, and train on them: the teacher never has to "
        "fit in memory.",
        metavar="DIR",
        panel=_TEACHER,
        path="writes",
    )
    cache_top: int = option(64, "Tokens per position in the cache.", metavar="N", panel=_TEACHER)
    seed: int = 0

    @property
    def loss(self) -> LossOptions:
        """What is minimised."""
        from moetools.training.loss import LossOptions

        divergence: str = self.divergence
        return LossOptions(alpha=self.alpha, temperature=self.temperature, divergence=divergence)  # type: ignore[arg-type]

    @property
    def wanted(self) -> bool:
        """Whether there is to be any training."""
        return any(bound is not None for bound in (self.steps, self.epochs, self.max_minutes))

    def check(self) -> None:
        """Refuse settings that cannot be used.

        Raises:
            UserError: naming the option.
        """
        for name in ("steps", "epochs", "max_minutes", "learning_rate", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"`{name}={value}` is not a positive number")
        for name in ("train_batch_size", "accumulate", "log_every", "cache_top"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}={getattr(self, name)}` is below 1")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"`alpha={self.alpha}` is not between 0 and 1")
        for name, legal in (("divergence", DIVERGENCES), ("train", PARTS), ("train_baseline", (None, *BASELINES))):
            if getattr(self, name) not in legal:
                known = ", ".join(one for one in legal if one is not None)
                raise UserError(f"`{name}={getattr(self, name)}` is unknown; legal: {known}")
        if self.tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
            raise UserError("`tensorboard` needs the package tensorboard", hint="pip install 'moetools[tensorboard]'")
        for name in ("hidden_weight", "weight_decay", "save_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"`{name}={getattr(self, name)}` is not 0 or more")
        if self.teacher_cache is not None and self.hidden_weight:
            raise UserError("`hidden_weight` needs the teacher's hidden states", hint="leave out `teacher_cache`")
        if self.teacher_cache is not None and self.divergence != "forward":
            raise UserError(
                f"`divergence={self.divergence}` needs the teacher's whole distribution",
                hint="leave out `teacher_cache`, or use `divergence=forward`",
            )


def processes() -> int:
    """Processes that train together (torchrun, accelerate launch)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def planned_steps(options: TrainOptions, sequences: int, world: int) -> int:
    """Optimizer steps at most."""
    per_epoch = max(1, sequences // (options.train_batch_size * options.accumulate * world))
    bounds = [options.steps, None if options.epochs is None else max(1, round(options.epochs * per_epoch))]
    given = [bound for bound in bounds if bound is not None]
    return min(given) if given else _MOST_EPOCHS * per_epoch
