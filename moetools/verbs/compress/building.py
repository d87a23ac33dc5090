"""Plans as chains of commands: what builds them, and how far they are from the original."""

import hashlib
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
from moetools.errors import CheckpointError, MoetoolsError
from moetools.formats.reader import open_model
from moetools.forward.evaluate import Evaluator
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.unchanged import Unchanged
from moetools.text.tokens import TokenBatch, TokenData, pad_right
from moetools.verbs.catalogue import VERBS, Verb
from moetools.verbs.compress.prediction import Probe
from moetools.verbs.route.data import prompts, task_tokens
from moetools.verbs.train.healing import BATCH, LEARNING_RATES

_REDUCTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "prune": ("prune-experts", "keep", {"method": "reap", "refit": "joint", "sequential": True}),
    "merge": ("merge-experts", "to", {"method": "joint"}),
}
_HEALING: dict[str, Any] = {
    "train_batch_size": BATCH,
    "learning_rate": LEARNING_RATES["all"],
    "relative_rate": True,
}

_SHORTEST = 32
"""Tokens of a sequence that is cut."""


def commands(plan: Probe, target: str, heal_minutes: float | None = None) -> list[tuple[Verb, dict[str, Any]]]:
    """The commands that make a plan of the original, with their options beside the text.

    Args:
        heal_minutes: of training towards the original's predictions: behind the reduction, where all weights can be
            trained, and of a plan with all experts behind the quantization, where only those that are not packed can.
    """
    found = []
    if plan.method != "none":
        name, count, options = _REDUCTIONS[plan.method]
        found.append((_verb(name), {count: plan.experts, **options}))
    if plan.bits.experts is not None:
        loader = {"target": "vllm"} if target == "vllm" else {}
        found.append((_verb("quantize"), {"method": "gptq", **plan.bits.options(), **loader}))
    if heal_minutes is not None:
        found.insert(1, (_verb("distill"), {"max_minutes": heal_minutes, **_HEALING}))
    return found


def inputs_of(verb: Verb, original: Path, behind: Path, *, alone: bool = True) -> tuple[Path, dict[str, Any]]:
    """The folder that a command of a chain is given, and options that name another one.

    What is trained, and what is rounded, is led by the original's predictions and hidden states.

    Args:
        behind: what the commands before it made; the original for the first.
        alone: whether the original is rounded towards itself, too.
    """
    if verb.name == "distill":
        return original, {"student": behind}
    led = verb.name == "quantize" and (alone or behind != original)
    return behind, {"reference": original} if led else {}


def _clear(folder: Path) -> None:
    """Remove what an interrupted run left half removed, which no command would overwrite; the folder is our own."""
    if folder.exists():
        shutil.rmtree(folder)


def _verb(name: str) -> Verb:
    return next(verb for verb in VERBS if verb.name == name)


class Builder:
    """Builds plans of one model in a folder of its own; what two plans begin with is made once.

    What was built is written down beside it, so that a run that goes on does not build it again.

    Args:
        text: options that say what the commands are calibrated on (`as_options`).
        settings: what the results depend on beside their commands: contents of model and text.
        tokens: of the text.
        alone: whether a plan with all experts is rounded towards the original, too: it loses a tenth less, and takes
            two runs over the text more.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        target: str,
        text: Mapping[str, Any],
        forward: ForwardOptions,
        progress: Progress | None,
        *,
        settings: str = "",
        tokens: int = 0,
        alone: bool = True,
    ) -> None:
        self.model, self.folder, self.target, self._progress = model, folder, target, progress
        known = {one.name: getattr(forward, one.name) for one in fields(forward)}
        self._shared = {**text, **known, "overwrite": True}
        self.settings, self.tokens, self._alone = settings, tokens, alone

    def build(
        self, plan: Probe, out: Path, *, verify: bool, heal_minutes: float | None = None, **more: Any
    ) -> list[dict[str, Any]]:
        """Make `out`; returns the report of every command, in order.

        Args:
            heal_minutes: see `commands`.
            more: options of the last command.
        """
        chain = commands(plan, self.target, heal_minutes)
        model, reports = self.model, []
        between = [self.folder / f"{plan.method}-{plan.experts}", out.with_name(f"{out.name}-healed")]
        for number, (verb, options) in enumerate(chain):
            last = number == len(chain) - 1
            target = out if last else between[number]
            reports.append(self.carry_out(verb, model, target, {**options, **(more if last else {})}, verify=verify))
            model = target
        return reports

    def carry_out(
        self, verb: Verb, behind: Path, target: Path, options: Mapping[str, Any], *, verify: bool
    ) -> dict[str, Any]:
        """The report of a command that makes `target`, carried out unless it was and the result still lies there."""
        model, named = inputs_of(verb, self.model, behind, alone=self._alone)
        options = {**options, **named}
        command = verb.written_call({verb.places[0].name: model, "out": target, **options})
        whole = f"{self.settings} {verify} {command} {_key_of(behind)}"
        key = hashlib.sha256(whole.encode()).hexdigest()
        known = _record_of(target, key)
        if known is not None:
            return known
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target)
        values = {**self._shared, **options, "verify": verify}
        report = verb.call([model, target], values, command=command, progress=self._progress)
        found = json.loads(json.dumps(report.to_json(), default=str))
        record = {"key": key, "fingerprint": open_model(target).fingerprint(), "report": found}
        write_durably(_record_file(target), json.dumps(record).encode())
        return dict(found)


def _record_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.built.json")


def _key_of(made: Path) -> str:
    """Of the command that made a checkpoint; nothing for the original, which the settings speak of."""
    file = _record_file(made)
    return str(read_json_object(file).get("key")) if file.is_file() else ""


def _record_of(target: Path, key: str) -> dict[str, Any] | None:
    """The report of the command that made `target`; None if it was another one, or the result is not as it was."""
    try:
        record = read_json_object(_record_file(target))
        report = record.get("report")
        sound = record.get("key") == key and record.get("fingerprint") == open_model(target).fingerprint()
    except MoetoolsError:
        return None
    return report if sound and isinstance(report, dict) else None


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
    """KL of probes, each built and thrown away; kept in a file for a run that goes on.

    Args:
        settings: what they depend on beside their text; measurements under others are forgotten.
        same_inputs: refuses what was measured while the original changed.
    """

    def __init__(self, file: Path, settings: str, judge: Judge, same_inputs: Unchanged) -> None:
        self._file, self._settings, self._judge, self._same_inputs = file, settings, judge, same_inputs
        self._known = _measured_before(file, settings)

    def kl(self, probe: Probe, builder: Builder) -> float:
        """Of a probe on a builder's text, measured now or in the interrupted run before."""
        name = f"{builder.settings} {probe!r}"
        if name not in self._known:
            out = builder.folder / "probe"
            more: dict[str, Any] = {"format": "moetools"} if probe.bits.experts is not None else {}
            with self._same_inputs:
                builder.build(probe, out, verify=False, **more)
                measured = self._judge.kl(out)
            shutil.rmtree(out)
            self._remember(name, measured)
        return self._known[name]

    def of_built(self, folder: Path) -> float:
        """Of a checkpoint, likewise."""
        name = open_model(folder).fingerprint()
        if name not in self._known:
            self._remember(name, self._judge.kl(folder))
        return self._known[name]

    def _remember(self, name: str, measured: float) -> None:
        self._known[name] = measured
        write_durably(self._file, json.dumps({"settings": self._settings, "kl": self._known}).encode())


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


def some_of(tokens: TokenData, most: int, *, least: int = 1) -> TokenData:
    """The first sequences of every task, about `most` tokens of all together.

    Args:
        least: sequences of all tasks together at least; they are cut where whole ones would be too many tokens.
    """
    count = len(tokens.tasks)
    length = min(tokens.seq_len, max(_SHORTEST, most // max(least, count)))
    share = max(most // (count * length), math.ceil(least / count), 1)
    seen = dict.fromkeys(range(count), 0)
    kept = []
    for batch in tokens.batches:
        task = int(batch.task[0])
        take = min(share - seen[task], len(batch.input_ids))
        seen[task] += max(0, take)
        if take > 0:
            mask = batch.attention_mask
            kept.append(
                TokenBatch(
                    input_ids=batch.input_ids[:take, :length],
                    attention_mask=None if mask is None else mask[:take, :length],
                    task=batch.task[:take],
                )
            )
    fingerprint = f"{tokens.fingerprint}:{share}:{length}"
    return TokenData(tasks=tokens.tasks, batches=tuple(kept), fingerprint=fingerprint, seq_len=length)
