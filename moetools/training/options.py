"""How a student is trained: the settings of the loop, and how many steps they come to."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from moetools.errors import UserError
from moetools.training.loss import LossOptions

_MOST_EPOCHS = 1000


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a student is trained.

    Attributes:
        steps, epochs, minutes: the training ends with the first of those given.
        batch_size: sequences per process and forward pass.
        accumulate: forward passes per optimizer step.
        learning_rate: of AdamW, for matrices; see `relative`.
        relative: learning rates are relative to the root mean square of each tensor.
        weight_decay: of AdamW.
        loss: what is minimised.
        hidden_weight: of the distance of hidden states; 0 for none.
        bf16: mixed precision with bfloat16 (weights and optimizer stay fp32).
        gradient_checkpointing: recompute activations in the backward pass.
        log_every, save_every: steps between lines of the record, and between checkpoints (0: none).
        fsdp: shard weights, gradients and optimizer state over all processes (FSDP2).
        tensorboard: folder for event files.
        seed: of the order of the sequences.
    """

    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-3
    relative: bool = False
    weight_decay: float = 0.0
    loss: LossOptions = field(default_factory=LossOptions)
    hidden_weight: float = 0.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    log_every: int = 10
    save_every: int = 0
    fsdp: bool = False
    tensorboard: Path | None = None
    seed: int = 0

    @property
    def wanted(self) -> bool:
        """Whether there is to be any training."""
        return any(bound is not None for bound in (self.steps, self.epochs, self.minutes))

    def check(self) -> None:
        """Refuse numbers that cannot be used.

        Raises:
            UserError: naming the option.
        """
        bounds = {"--steps": self.steps, "--epochs": self.epochs, "--max-minutes": self.minutes}
        positive = {**bounds, "--learning-rate": self.learning_rate, "--temperature": self.loss.temperature}
        for option, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{option} {value} is not a positive number")
        counts = {"--train-batch-size": self.batch_size, "--accumulate": self.accumulate, "--log-every": self.log_every}
        for option, count in counts.items():
            if count < 1:
                raise UserError(f"{option} {count} is below 1")
        if not 0 <= self.loss.alpha <= 1:
            raise UserError(f"--alpha {self.loss.alpha} is not between 0 and 1")
        if self.loss.divergence not in ("forward", "reverse", "jsd"):
            raise UserError(f"--divergence '{self.loss.divergence}' is unknown; legal: forward, reverse, jsd")
        if self.tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard needs the package tensorboard", hint="pip install 'moetools[tensorboard]'")
        if self.hidden_weight < 0:
            raise UserError(f"--hidden-weight {self.hidden_weight} is below 0")


def processes() -> int:
    """Processes that train together (torchrun, accelerate launch)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def planned_steps(options: TrainOptions, sequences: int, world: int) -> int:
    """Optimizer steps at most."""
    per_epoch = max(1, sequences // (options.batch_size * options.accumulate * world))
    bounds = [options.steps, None if options.epochs is None else max(1, round(options.epochs * per_epoch))]
    given = [bound for bound in bounds if bound is not None]
    return min(given) if given else _MOST_EPOCHS * per_epoch
