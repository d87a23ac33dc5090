"""How long a training runs and what its learning rate is on the way: bounded by steps, by minutes, or by both."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_WARM_UP_SHARE = 0.03


class Pace(TrainerCallback):
    """Progress of a training from 0 to 1: the share of the steps or of the seconds, whichever is larger.

    The learning rate follows it: linear warm-up over the first 3 %, then half a cosine down to 0. Without a limit in
    seconds it depends on the step alone.

    Args:
        steps: optimizer steps at most.
        seconds: wall time at most; an interrupted and resumed run counts the time it really trained.

    Attributes:
        tokens: predicted tokens trained on by this process.
    """

    def __init__(self, *, steps: int, seconds: float | None = None) -> None:
        self.steps, self.seconds = steps, seconds
        self.elapsed, self.tokens = 0.0, 0
        self._since: float | None = None

    def spent(self) -> float:
        """Seconds of training so far."""
        return self.elapsed + (0.0 if self._since is None else time.monotonic() - self._since)

    def progress(self, step: int) -> float:
        """Share of the whole behind us after `step` steps."""
        share = step / self.steps
        return min(1.0, share if self.seconds is None else max(share, self.spent() / self.seconds))

    def factor(self, step: int) -> float:
        """Of the learning rate of the step that follows `step` finished ones."""
        progress = self.progress(step)
        warm = min(1.0, max(progress, (step + 1) / self.steps if self.seconds is None else 1e-3) / _WARM_UP_SHARE)
        return warm * 0.5 * (1 + math.cos(math.pi * progress))

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self.recall(state)
        self._since = time.monotonic()

    def recall(self, state: TrainerState) -> None:
        """Go on from what a saved state says was done."""
        for line in reversed(state.log_history):
            if "seconds" in line:
                self.elapsed, self.tokens = line["seconds"], int(line["tokens"])
                break

    def on_step_end(self, _args: TrainingArguments, _state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.seconds is not None and self.spent() >= self.seconds:
            control.should_training_stop = True
