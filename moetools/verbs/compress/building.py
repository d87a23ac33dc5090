"""Plans as chains of commands: what builds them, and how far they are from the original."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.folder import read_json_object
from moetools.errors import CheckpointError
from moetools.formats.reader import open_model
from moetools.forward.evaluate import Evaluator
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.passes.layer_equations import HELD_OUT_EVERY
from moetools.pipeline.unchanged import Unchanged
from moetools.text.tokens import TokenBatch, TokenData, pad_right
from moetools.verbs.catalogue import VERBS, Verb
from moetools.verbs.compress.prediction import Probe
from moetools.verbs.route.data import prompts, task_tokens

_REDUCTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "prune": ("prune-experts", "keep", {"method": "reap", "refit": "joint", "sequential": True}),
    "merge": ("merge-experts", "to", {"method": "joint"}),
}


def commands(plan: Probe, target: str) -> list[tuple[Verb, dict[str, Any]]]:
    """The commands that make a plan of the original, with their options beside the text."""
    found = []
    if plan.method != "none":
        name, count, options = _REDUCTIONS[plan.method]
        found.append((_verb(name), {count: plan.experts, **options}))
    if plan.bits.experts is not None:
        loader = {"target": "vllm"} if target == "vllm" else {}
        found.append((_verb("quantize"), {"method": "gptq", **plan.bits.options(), **loader}))
    return found


def _clear(folder: Path) -> None:
    """Remove what an interrupted run left half removed, which no command would overwrite; the folder is our own."""
    if folder.exists():
        shutil.rmtree(folder)


def _verb(name: str) -> Verb:
    return next(verb for verb in VERBS if verb.name == name)


class Builder:
    """Builds plans of one model in a folder of its own; what two plans begin with is made once.

    Args:
        text: options that say what the commands are calibrated on (`as_options`).
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        target: str,
        text: Mapping[str, Any],
        forward: ForwardOptions,
        progress: Progress | None,
    ) -> None:
        self.model, self.folder, self.target, self._progress = model, folder, target, progress
        known = {one.name: getattr(forward, one.name) for one in fields(forward)}
        self._shared = {**text, **known, "overwrite": True}
        self.reports: dict[Path, dict[str, Any]] = {}

    def build(self, plan: Probe, out: Path, *, verify: bool, **more: Any) -> list[dict[str, Any]]:
        """Make `out`; returns the report of every command, in order.

        Args:
            more: options of the last command.
        """
        chain = commands(plan, self.target)
        model, reports = self.model, []
        for number, (verb, options) in enumerate(chain):
            last = number == len(chain) - 1
            target = out if last else self.folder / f"{plan.method}-{plan.experts}"
            if last or target not in self.reports:
                target.parent.mkdir(parents=True, exist_ok=True)
                _clear(target)
                values = {**self._shared, **options, **(more if last else {}), "verify": verify}
                command = verb.written_call({"model": model, "out": target, **options, **(more if last else {})})
                report = verb.call([model, target], values, command=command, progress=self._progress)
                self.reports[target] = dict(report.to_json())
            reports.append(self.reports[target])
            model = target
        return reports


class Judge:
    """KL of checkpoints to the original, on the same text; the original runs once."""

    def __init__(self, model: Path, tokens: TokenData, forward: ForwardOptions, progress: Progress | None) -> None:
        self._forward, self._progress = forward, progress
        self._evaluator = Evaluator(tokens, reference=self._open(model))

    def kl(self, path: Path) -> float:
        """Mean over tasks, nats per token."""
        agreement = self._evaluator.measure(self._open(path)).agreement
        assert agreement is not None
        return agreement.kl

    def _open(self, path: Path) -> StreamedModel:
        return StreamedModel(open_model(path), self._forward, progress=self._progress, only_run=True)


class Measurements:
    """KL of probes, each built on little text and thrown away; kept in a file for a run that goes on.

    Args:
        settings: what they depend on; measurements under others are forgotten.
        same_inputs: refuses what was measured while the original changed.
    """

    def __init__(self, file: Path, settings: str, builder: Builder, judge: Judge, same_inputs: Unchanged) -> None:
        self._file, self._settings, self._builder, self._judge = file, settings, builder, judge
        self._same_inputs = same_inputs
        self._known = _measured_before(file, settings)

    def kl(self, probe: Probe) -> float:
        """Of a probe, measured now or in the interrupted run before."""
        if repr(probe) not in self._known:
            out = self._builder.folder / "probe"
            more = {"format": "moetools"} if probe.bits.experts is not None else {}
            with self._same_inputs:
                self._builder.build(probe, out, verify=False, **more)
                measured = self._judge.kl(out)
            self._known[repr(probe)] = measured
            shutil.rmtree(out)
            write_durably(self._file, json.dumps({"settings": self._settings, "kl": self._known}).encode())
        return self._known[repr(probe)]


def _measured_before(file: Path, settings: str) -> dict[str, float]:
    """By probe; nothing where the file is missing or damaged: it is measured again."""
    try:
        stored = read_json_object(file)
    except CheckpointError:
        return {}
    known = stored.get("kl")
    if stored.get("settings") != settings or not isinstance(known, dict):
        return {}
    sound = all(isinstance(value, float) and math.isfinite(value) for value in known.values())
    return known if sound else {}


def as_options(tokens: TokenData, folder: Path) -> dict[str, Any]:
    """Options that make a command read these tokens; they are stored in `folder`, a file per task."""
    folder.mkdir(parents=True, exist_ok=True)
    named = []
    for task in tokens.tasks:
        sequences = prompts(task_tokens(tokens, task))
        ids, mask = pad_right(sequences, 0)
        stored = {"input_ids": ids.contiguous()} | ({} if mask is None else {"attention_mask": mask.to(torch.int64)})
        save_file(stored, folder / f"{task}.safetensors")
        named.append(f"{task}={folder / task}.safetensors")
    return {"data": named, "seq_len": tokens.seq_len, "samples": "all"}


def some_of(tokens: TokenData, most: int) -> TokenData:
    """The first sequences of every task, about `most` tokens of all together, but no fewer than a refit needs."""
    share = max(most // (len(tokens.tasks) * tokens.seq_len), math.ceil(2 * HELD_OUT_EVERY / len(tokens.tasks)))
    seen = dict.fromkeys(range(len(tokens.tasks)), 0)
    kept = []
    for batch in tokens.batches:
        task = int(batch.task[0])
        take = min(share - seen[task], len(batch.input_ids))
        seen[task] += max(0, take)
        if take > 0:
            mask = batch.attention_mask
            kept.append(
                TokenBatch(
                    input_ids=batch.input_ids[:take],
                    attention_mask=None if mask is None else mask[:take],
                    task=batch.task[:take],
                )
            )
    return TokenData(
        tasks=tokens.tasks, batches=tuple(kept), fingerprint=f"{tokens.fingerprint}:{share}", seq_len=tokens.seq_len
    )
