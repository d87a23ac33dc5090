"""Distillation on transformers' Trainer: the loop, its record, its checkpoints, and when it stops."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.tensor_file import open_tensor_file
from moetools.errors import VerificationError
from moetools.forward.progress import Progress
from moetools.training.checkpoints import last_checkpoint, saving, step_of
from moetools.training.data import SequenceDataset, Sequences, collate
from moetools.training.distiller import Distiller
from moetools.training.options import TrainOptions, planned_steps, processes
from moetools.training.parameters import parameter_groups
from moetools.training.record import Record
from moetools.training.schedule import Pace
from moetools.training.trainer_arguments import event_files, trainer_arguments

_LOG = logging.getLogger(__name__)
_CHECKS = 10
_BEST, _CURVE = "best.safetensors", "curve.json"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training brought.

    Attributes:
        state: the student's tensors by name in the model, on the CPU, of the check with the least held-out loss.
        curve: per check: step, held-out loss per token, its cross-entropy and divergence, seconds so far.
        steps, best_step: steps made, and the step whose weights are returned.
        tokens: predicted tokens trained on.
        seconds: wall time of the training, checks included.
        stopped: why it ended early; None if it did not.
    """

    state: Mapping[str, Tensor]
    curve: Sequence[Mapping[str, float]]
    steps: int
    best_step: int
    tokens: int
    seconds: float
    stopped: str | None


def train(
    distiller: Distiller,
    sequences: Sequences,
    options: TrainOptions,
    folder: Path,
    *,
    metrics: Path,
    stored: Mapping[str, torch.dtype] | None = None,
    resume: bool = False,
    progress: Progress,
) -> TrainResult:
    """Train `distiller.student` in place, and return its best weights.

    Text for less than one batch makes the batch smaller.

    Args:
        folder: for checkpoints of the run.
        stored: dtypes on disk by parameter name; checks measure the weights rounded to them, as they will be loaded.
        metrics: a JSONL file; every line has step, loss, cross_entropy, divergence, learning_rate, tokens and seconds,
            and lines of checks have held_out_loss.
        resume: go on from the last checkpoint in `folder`, if there is one.

    Raises:
        VerificationError: the loss is not finite at the start.
    """
    batch_size = min(options.train_batch_size, max(1, len(sequences.training) // processes()))
    options = replace(options, train_batch_size=batch_size)
    steps = planned_steps(options, len(sequences.training), processes())
    pace = Pace(steps=steps, seconds=None if options.max_minutes is None else 60 * options.max_minutes)
    trainer = _Trainer(
        model=distiller,
        args=trainer_arguments(options, folder, steps, distiller),
        train_dataset=SequenceDataset(sequences, sequences.training),
        data_collator=collate,
        callbacks=[pace, *event_files(options.tensorboard)],
        pace=pace,
        options=options,
        record=Record(metrics, progress, writes=int(os.environ.get("RANK", "0")) == 0),
        stored=stored or {},
        checks=_held_out_batches(sequences, options.train_batch_size),
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    last = last_checkpoint(folder) if resume else None
    step = 0 if last is None else step_of(last)
    progress.start("training", layers=1, tokens=_tokens(options, steps - step, sequences))
    progress.layer(0)
    try:
        stopped = trainer.run_from(last, step, steps)
    finally:
        progress.stop()
    return TrainResult(
        state=trainer.best,
        curve=trainer.curve,
        steps=trainer.state.global_step,
        best_step=trainer.best_step,
        tokens=pace.tokens * processes(),
        seconds=pace.spent(),
        stopped=stopped,
    )


def _tokens(options: TrainOptions, steps: int, sequences: Sequences) -> int:
    """Of some steps; 0 where it is not known, which is how many fit into some minutes."""
    if options.max_minutes is not None:
        return 0
    return steps * options.train_batch_size * options.accumulate * (_length(sequences) - 1)


def _length(sequences: Sequences) -> int:
    return max(len(sequences.ids[number]) for number in sequences.training)


def _held_out_batches(sequences: Sequences, size: int) -> list[dict[str, Tensor]]:
    dataset = SequenceDataset(sequences, sequences.held_out)
    items = [dataset[place] for place in range(len(dataset))]
    return [collate(items[start : start + size]) for start in range(0, len(items), size)]


class _NotFiniteError(Exception):
    pass


class _Trainer(Trainer):
    """The Trainer with our optimizer groups, schedule, record and held-out checks."""

    def __init__(
        self,
        *,
        pace: Pace,
        options: TrainOptions,
        record: Record,
        stored: Mapping[str, torch.dtype],
        checks: Sequence[dict[str, Tensor]],
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._pace, self._options, self._record, self._batches = pace, options, record, checks
        self._stored = stored
        self._sums = {"cross_entropy": 0.0, "divergence": 0.0, "tokens": 0.0}
        self.curve: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_step = self.checked_step = 0
        self._staged: Path | None = None
        self.add_callback(_Checks(self))

    def run_from(self, last: Path | None, step: int, steps: int) -> str | None:
        """Train from checkpoint `last`, saved behind `step`, to the end; why it ended early, None if it did not."""
        self._record.begin(step)
        self.recall(step)
        try:
            if not self.curve:
                self.check()
            if last is not None and step >= steps:
                self._load_from_checkpoint(str(last))
                self.state.global_step = step
                self._pace.recall(TrainerState.load_from_json(str(last / "trainer_state.json")))
            else:
                self.train(resume_from_checkpoint=None if last is None else str(last))
            if self.checked_step != self.state.global_step:
                self.check()
            self.keep_something()
        except _NotFiniteError:
            stopped = f"the loss was not finite at step {self.state.global_step + 1}"
            _LOG.warning("%s; the weights of step %d are kept", stopped, self.best_step)
            return stopped
        return None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if getattr(self, "optimizer", None) is None:
            groups = parameter_groups(model or self.model, self._options)
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        del num_training_steps
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self._pace.factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if not bool(loss.isfinite()):
            raise _NotFiniteError
        for name in self._sums:
            self._sums[name] += outputs[name].item()
        tokens = int(outputs["tokens"])
        self._pace.tokens += tokens
        self._record.advance(tokens)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums = self.accelerator.reduce(
                torch.tensor(list(self._sums.values()), dtype=torch.float64, device=self.args.device), reduction="sum"
            ).tolist()
            cross_entropy, divergence, tokens = sums
            self._sums = dict.fromkeys(self._sums, 0.0)
            logs = {
                **logs,
                "cross_entropy": cross_entropy / max(tokens, 1),
                "divergence": divergence / max(tokens, 1),
                "tokens": self._pace.tokens,
                "seconds": round(self._pace.spent(), 3),
            }
        super().log(logs, start_time)
        kept = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        self._record.add({"step": self.state.global_step, **kept})

    def check(self) -> None:
        """Held-out loss of the weights as they will be on disk; the best so far are kept."""
        with self._as_stored():
            point = self._held_out()
            if not math.isfinite(point["loss"]):
                if self.curve:
                    raise _NotFiniteError
                raise VerificationError(
                    "the student's loss is not finite before any training",
                    hint="the weights are damaged, or the compute dtype overflows: try `dtype=float32`",
                )
            better = not self.curve or point["loss"] < min(one["loss"] for one in self.curve)
            if better:
                self.best, self.best_step = self._weights(), self.state.global_step
        self.curve.append({**point, "seconds": round(self._pace.spent(), 3)})
        self.checked_step = self.state.global_step
        self._remember(better)
        self._record.add({"held_out_" + name if name != "step" else name: value for name, value in point.items()})

    def _held_out(self) -> dict[str, float]:
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        sums = {"loss": 0.0, "cross_entropy": 0.0, "divergence": 0.0, "tokens": 0.0}
        # The first check is made before the Trainer has put the model into its own autocast.
        with torch.no_grad(), self.accelerator.autocast():
            for batch in self._batches:
                found = model(**self._prepare_inputs(dict(batch)))
                for name in sums:
                    weight = float(found["tokens"]) if name == "loss" else 1.0
                    sums[name] += float(found[name]) * weight
        model.train(was_training)
        tokens = sums.pop("tokens")
        return {"step": self.state.global_step, **{name: value / tokens for name, value in sums.items()}}

    @contextlib.contextmanager
    def _as_stored(self) -> Iterator[None]:
        """The trained parameters rounded to their dtypes on disk, and as they were afterwards."""
        exact: list[tuple[Tensor, Tensor]] = []
        for name, parameter in self.model.named_parameters():
            dtype = self._stored.get(name.removeprefix("student."), parameter.dtype)
            if parameter.requires_grad and dtype != parameter.dtype:
                exact.append((parameter.data, parameter.data.clone()))
                parameter.data.copy_(parameter.data.to(dtype))
        try:
            yield
        finally:
            for data, kept in exact:
                data.copy_(kept)

    def keep_something(self) -> None:
        """The weights as they are, if the best were lost with an interrupted run and not found again."""
        if not self.best:
            self.best, self.best_step = self._weights(), self.state.global_step

    def _remember(self, better: bool) -> None:
        """For a resumed run: the checks so far and the best weights."""
        if not self._options.save_every or not self.args.should_save:
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if better:
            best = {name: self.best[name].contiguous() for name in _untied(self.best)}
            write_durably(folder / _BEST, save(best, metadata={"step": str(self.best_step)}))
        write_durably(folder / _CURVE, json.dumps(self.curve).encode())

    def recall(self, step: int) -> None:
        """Take up what a run had found that is resumed behind `step`; weights of a later step will be found again."""
        folder = Path(self.args.output_dir)
        if not step or not (folder / _CURVE).exists():
            return
        self.curve = [point for point in json.loads((folder / _CURVE).read_text()) if point["step"] <= step]
        stored = open_tensor_file(folder / _BEST)
        best_step = int(stored.metadata["step"])
        if best_step <= step:
            self.best, self.best_step = stored.read(), best_step

    def _weights(self) -> dict[str, Tensor]:
        """The student's tensors by name in the model, whole, on the CPU."""
        state = self.accelerator.get_state_dict(self.model_wrapped) if self.is_fsdp_enabled else self.model.state_dict()
        named = {name.removeprefix("student."): tensor for name, tensor in state.items()}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with saving(Path(self.args.output_dir), publishes=self.args.should_save) as staged:
            # Every process has to write into the folder before it is moved.
            self.accelerator.wait_for_everyone()
            self._staged = staged
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staged = None
            self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staged is None else str(self._staged)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # safetensors refuses tensors that share memory: of tied weights one is enough.
        state = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: state[name] for name in _untied(state)})


class _Checks(TrainerCallback):
    """Measures the held-out loss ten times during a run."""

    def __init__(self, trainer: _Trainer) -> None:
        self._trainer, self._done = trainer, 0

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self._done = int(self._trainer._pace.progress(state.global_step) * _CHECKS)

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        every = self._trainer._options.save_every
        # A checkpoint begins with a line of the record, so that a resumed run counts on from it.
        control.should_log = control.should_log or bool(every and state.global_step % every == 0)
        reached = int(self._trainer._pace.progress(state.global_step) * _CHECKS)
        if reached > self._done:
            self._done = reached
            self._trainer.check()


def _untied(state: Mapping[str, Tensor]) -> Iterator[str]:
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            yield name
