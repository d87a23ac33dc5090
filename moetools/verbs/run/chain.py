"""Carry out a recipe: which steps must run, one after the other, and what is cleaned up behind them."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from moetools.arguments import about, paths
from moetools.checkpoint.lock import lock_folder
from moetools.checkpoint.output import real
from moetools.errors import CheckpointError, MoetoolsError, UserError
from moetools.forward.progress import Progress
from moetools.pipeline.table import Table
from moetools.text.sources import parse_data_option
from moetools.verbs.run.recipe import Recipe, Step
from moetools.verbs.run.report import RunReport, StepReport
from moetools.verbs.run.state import (
    Record,
    RunState,
    checkpoints_in,
    fingerprints,
    read_steps,
    step_keys,
    tensor_bytes,
)

_LOCK = "lock"


class Chain:
    """One run of a recipe.

    Raises:
        UserError: a folder that is not a run's own, an input that is missing.
        CheckpointError: a record of an earlier run that cannot be read.
    """

    def __init__(self, recipe: Recipe, progress: Progress | None) -> None:
        self.recipe, self._progress = recipe, progress
        self.state = RunState(recipe.out)
        self.keys = step_keys(recipe)
        read_by = {step.name: read_steps(step, recipe) for step in recipe.everything()}
        used = {one.name for step in recipe.steps for one in read_by[step.name]}
        self.kept = {step.name for step in recipe.steps if step.keep or step.name not in used}
        self.to_run = self._to_run(read_by)

    def _to_run(self, read_by: Mapping[str, list[Step]]) -> set[str]:
        """Steps that are not finished, and those whose output such a step reads and that is not there."""
        needed: set[str] = set()
        found: set[str] = set()
        for step in reversed(self.recipe.everything()):
            wanted = step.name in needed or step.name in self.kept or step.out is None
            if not wanted or self.state.is_there(step, self.keys[step.name]):
                continue
            found.add(step.name)
            needed |= {one.name for one in read_by[step.name]}
        return found

    def check(self) -> RunReport:
        """What every step would do; everything that can be refused without weights is.

        Steps behind one that makes a checkpoint of known shape are checked on its outline.
        """
        with _stand_ins(self.recipe.out) as scratch:
            moved: dict[Path, Path | None] = {}
            steps = [self._checked(step, moved, scratch) for step in self.recipe.steps]
        report = self.recipe.report
        comparison = None if report is None else self._checked(report, moved, scratch)
        return self._report(steps, comparison, dry_run=True)

    def run(self) -> RunReport:
        """Carry out what is not done yet, and remove what only later steps needed.

        Raises:
            MoetoolsError: what a step refuses, naming it; finished steps stay finished.
        """
        steps = [self._done(step) for step in self.recipe.steps]
        comparison = None if self.recipe.report is None else self._done(self.recipe.report)
        return self._report([self._cleaned(step) for step in steps], comparison, dry_run=False)

    def _report(self, steps: list[StepReport], comparison: StepReport | None, *, dry_run: bool) -> RunReport:
        recipe = self.recipe
        return RunReport(about=recipe.about, out=recipe.out, steps=tuple(steps), comparison=comparison, dry_run=dry_run)

    def _checked(self, step: Step, moved: dict[Path, Path | None], scratch: Path) -> StepReport:
        """The dry run of one step; `moved` says where the outputs of earlier ones stand, None: nowhere yet."""
        if step.name not in self.to_run:
            if step.out is not None and self.state.records[step.name].cleaned:
                moved[step.out] = None
            return self._kept_report(step)
        with _naming(step):
            _check_inputs(step, list(moved))
        outline = scratch / f"{step.name}-outline"
        values = {**step.places, **step.options}
        unknown = [folder.name for folder, place in moved.items() if place is None and _mentions(values, folder)]
        note, report = "", None
        if step.out is None:
            note = "measures"
        elif unknown:
            note = f"checked when '{unknown[0]}' is made"
        else:
            standing = {name: _moved(value, moved) for name, value in values.items()}
            how = {"dry_run": True, "outline": outline}
            report = self._call(step, standing, how, scratch / step.name)
        if step.out is not None:
            moved[step.out] = outline if outline.exists() else None
        found = replace(_step_report(step, "would run", note, report), nbytes=_planned_bytes(report, outline))
        return _as_if_in(self.recipe.out, scratch, found)

    def _done(self, step: Step) -> StepReport:
        if step.name not in self.to_run:
            return self._kept_report(step)
        before, key = self.state.records.get(step.name), self.keys[step.name]
        how = {} if step.out is None else self._how(step, before, key)
        self.state.save(step.name, replace(before, key=key, done=False) if before else Record(key=key))
        began = time.monotonic()
        values = {**step.places, **step.options}
        if step is self.recipe.report:
            values["models"] = [str(path) for one in self.recipe.steps if one.out for path in checkpoints_in(one.out)]
        report = self._call(step, values, how, step.out)
        record = Record(
            key=key,
            done=True,
            seconds=time.monotonic() - began,
            nbytes=None if step.out is None else tensor_bytes(step.out),
            checkpoints={} if step.out is None else fingerprints(step.out),
            report=dict(report.to_json()),
            tables=[asdict(table) for table in report.tables()],
        )
        self.state.save(step.name, record)
        return self._kept_report(step, "done")

    def _how(self, step: Step, before: Record | None, key: str) -> dict[str, bool]:
        """Go on where the same step was interrupted, else replace what an earlier run of this folder left."""
        assert step.out is not None
        there = step.out.exists()
        if there and (before is None or (before.done and not before.cleaned and not self.state.is_untouched(step))):
            raise UserError(
                f"step '{step.name}' writes '{step.out}', which is there and not what this run made",
                hint="move it away, or choose another `out`",
            )
        same = before is not None and before.key == key
        return {"resume": same, "overwrite": there or (before is not None and not same)}

    def _call(self, step: Step, values: Mapping[str, Any], how: Mapping[str, Any], out: Path | None) -> Any:
        given = {**values} if out is None else {**values, "out": out}
        places = [given[place.name] for place in step.verb.places]
        options = {name: value for name, value in given.items() if name in step.options}
        command = step.verb.written_call({**step.places, **({} if out is None else {"out": step.out}), **step.options})
        with _naming(step):
            return step.verb.call(places, {**options, **how}, command=command, progress=self._progress)

    def _kept_report(self, step: Step, state: str = "unchanged") -> StepReport:
        record = self.state.records[step.name]
        tables = tuple(Table(**table) for table in record.tables)
        found = _step_report(step, state, "cleaned" if record.cleaned else "", None)
        return replace(found, seconds=record.seconds, nbytes=record.nbytes, report=record.report, tables=tables)

    def _cleaned(self, found: StepReport) -> StepReport:
        """Remove the output of a step that is not kept, if nobody changed it."""
        step = next(one for one in self.recipe.steps if one.name == found.name)
        if step.name in self.kept or step.out is None or not self.state.is_untouched(step):
            return found
        shutil.rmtree(step.out)
        self.state.save(step.name, replace(self.state.records[step.name], cleaned=True))
        return replace(found, note="cleaned")


def _planned_bytes(report: Any, outline: Path) -> int | None:
    if outline.exists():
        return tensor_bytes(outline)
    after = {} if report is None else report.to_json().get("after")
    return int(after["bytes"]) if isinstance(after, dict) and "bytes" in after else None


def _step_report(step: Step, state: str, note: str, report: Any) -> StepReport:
    return StepReport(
        name=step.name,
        verb=step.verb.name,
        words=step.words(),
        state=state,
        note=note,
        seconds=0.0,
        nbytes=None,
        out=step.out,
        report=None if report is None else report.to_json(),
        tables=() if report is None else tuple(report.tables()),
    )


def _as_if_in(out: Path, scratch: Path, found: StepReport) -> StepReport:
    """What a dry run in `scratch` says, with the real output in its place."""
    written, meant = (json.dumps(str(folder))[1:-1] for folder in (scratch, out))
    report = json.loads(json.dumps(found.report, default=str).replace(written, meant))
    tables = tuple(replace(table, title=table.title.replace(str(scratch), str(out))) for table in found.tables)
    return replace(found, report=report, tables=tables)


def _check_inputs(step: Step, outputs: list[Path]) -> None:
    """Text and folders that a step reads are there, unless an earlier step makes them."""
    given: list[tuple[str, Path]] = []
    for value in step.places.values():
        given += [("model", Path(one)) for one in (value if isinstance(value, list) else [value])]
    for options in step.instances():
        given += paths(options, "reads")
        texts = [one for one in fields(options) if (about(one) or {}).get("metavar") == "NAME=PATH"]
        for one in texts:
            parse_data_option(getattr(options, one.name), one.name)
    for what, path in given:
        if not path.exists() and not any(_mentions({what: path}, out) for out in outputs):
            raise UserError(f"{what} '{path}' does not exist")


def _mentions(values: Mapping[str, Any], folder: Path) -> bool:
    return values != {name: _moved(value, {folder: folder / "moved"}) for name, value in values.items()}


def _moved(value: Any, places: Mapping[Path, Path | None]) -> Any:
    """`value` with every path in an output replaced by the same in its stand-in."""
    if isinstance(value, list):
        return [_moved(one, places) for one in value]
    if not isinstance(value, Path | str):
        return value
    name, equals, path = str(value).partition("=")
    head, tail = (name + equals, path) if equals else ("", str(value))
    for folder, stand_in in places.items():
        if stand_in is not None and (tail == str(folder) or tail.startswith(f"{folder}/")):
            return type(value)(head + str(stand_in) + tail[len(str(folder)) :])
    return value


@contextmanager
def _naming(step: Step) -> Iterator[None]:
    """What is refused inside says which step it is about."""
    try:
        yield
    except MoetoolsError as error:
        if "`resume`" in error.hint:
            error.hint = "run the recipe again: what is finished is kept"
        error.message = f"step '{step.name}': {error.message}"
        error.args = (error.message,)
        raise


@contextmanager
def _stand_ins(out: Path) -> Iterator[Path]:
    """A folder beside the outputs that is gone afterwards; what a run that was killed left there goes, too."""
    folder = real(out).with_name(f".{real(out).name}.moetools-dry-run")
    if folder.is_symlink():
        raise CheckpointError(f"'{folder}' is a link", hint="move it out of the way")
    lock = lock_folder(folder, _LOCK, out)
    try:
        for entry in folder.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()
