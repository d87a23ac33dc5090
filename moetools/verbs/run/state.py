"""What a run has done so far, kept in its folder: which steps are finished, and with which settings and inputs."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moetools import __version__
from moetools.arguments import about, paths
from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.output import real
from moetools.checkpoint.reader import open_checkpoint
from moetools.checkpoint.shards import file_digest
from moetools.errors import CheckpointError
from moetools.verbs.run.recipe import Recipe, Step

FILE_NAME = "moetools-run.json"


@dataclass(kw_only=True)
class Record:
    """One step that was started.

    Attributes:
        key: of its settings and inputs (`step_keys`).
        done: it has finished; otherwise it was interrupted.
        cleaned: its output was needed by later steps alone and is gone.
        checkpoints: fingerprint of every checkpoint it wrote, by its place in the output.
        nbytes: of the tensors in them.
        report: what the verb returned, as JSON; `tables` as it shows it.
    """

    key: str
    done: bool = False
    cleaned: bool = False
    seconds: float = 0.0
    nbytes: int | None = None
    checkpoints: dict[str, str] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    tables: list[dict[str, Any]] = field(default_factory=list)


class RunState:
    """The records of a run's steps, by name; every change is on disk at once."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE_NAME
        stored = read_json_object(self._file) if self._file.is_file() else {"steps": {}}
        try:
            self.records = {name: Record(**record) for name, record in stored["steps"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self._file}: not what a run writes: {error}", hint="use another `out`") from None

    def save(self, name: str, record: Record) -> None:
        """Keep what is known of a step."""
        self.records[name] = record
        self._file.parent.mkdir(exist_ok=True)
        text = json.dumps({"steps": {one: asdict(kept) for one, kept in self.records.items()}}, indent=1, default=str)
        write_durably(self._file, text.encode())

    def is_finished(self, step: Step, key: str) -> bool:
        """Whether the step was done with the same settings and inputs, whatever became of its output."""
        record = self.records.get(step.name)
        return record is not None and record.done and record.key == key

    def is_there(self, step: Step, key: str) -> bool:
        """Whether it is finished and what it wrote lies where it was, unchanged."""
        if not self.is_finished(step, key):
            return False
        written = [path for kind in step.instances() for _, path in paths(kind, "writes")]
        return all(path.exists() for path in written) and self.is_untouched(step)

    def is_untouched(self, step: Step) -> bool:
        """Whether the step's output is the one that it wrote."""
        record = self.records.get(step.name)
        if record is None or not record.done:
            return False
        return step.out is None or (not record.cleaned and fingerprints(step.out) == record.checkpoints)


def checkpoints_in(out: Path) -> list[Path]:
    """The checkpoints that a step wrote: its folder, or the folders in it (one per task)."""
    folders = [out, *(sorted(out.iterdir()) if out.is_dir() else ())]
    found = [folder for folder in folders if (folder / "config.json").is_file()]
    return found[:1] if found[:1] == [out] else found


def tensor_bytes(out: Path) -> int:
    """Bytes of all tensors that a step wrote."""
    return sum(open_checkpoint(path).total_bytes for path in checkpoints_in(out))


def fingerprints(out: Path) -> dict[str, str]:
    """Fingerprint of every checkpoint of an output, by its place in it."""
    found = checkpoints_in(out)
    return {str(path.relative_to(out)): open_checkpoint(path).fingerprint() for path in found}


def step_keys(recipe: Recipe) -> dict[str, str]:
    """A digest of all that decides what a step comes to: verb, options, contents of what it reads, version.

    What an earlier step makes counts by that step's key: it is known before that is made and after it is gone.
    """
    keys: dict[str, str] = {}
    made: dict[Path, str] = {}
    for step in recipe.everything():
        values = {**step.places, **step.options}
        reads = {text: identity(Path(text), made) for text in _named(step)}
        report = {"of": dict(keys)} if step is recipe.report else {}
        whole = {"verb": step.verb.name, "values": values, "reads": reads, "version": __version__, **report}
        keys[step.name] = hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()
        if step.out is not None:
            made[real(step.out)] = keys[step.name]
    return keys


def read_steps(step: Step, recipe: Recipe) -> list[Step]:
    """The steps whose output a step reads; the report reads all."""
    if step is recipe.report:
        return [one for one in recipe.steps if one.out is not None]
    texts = {real(Path(text)) for text in _named(step)}
    writers = [one for one in recipe.steps if one.out is not None and one is not step]
    return [one for one in writers if one.out and any(_inside(text, real(one.out)) for text in texts)]


def identity(path: Path, made: Mapping[Path, str]) -> str | None:
    """What lies at a path, in a few words that change with it; None where there is nothing.

    Args:
        made: outputs of steps -> their keys.
    """
    place = real(path)
    for folder, key in made.items():
        if _inside(place, folder):
            return f"step {key} {place.relative_to(folder)}"
    if place.is_file():
        return file_digest(place)
    if (place / "config.json").is_file():
        return open_checkpoint(place).fingerprint()
    if place.is_dir():
        files = [file for file in sorted(place.rglob("*")) if file.is_file()]
        return hashlib.sha256(json.dumps([[str(file), file_digest(file)] for file in files]).encode()).hexdigest()
    return None


def _inside(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _named(step: Step) -> Iterator[str]:
    """Every text among a step's folders and options that may be a path it reads, and what is behind NAME=."""
    known = {one.name: about(one) or {} for _, one in step.verb.arguments()}
    named = {name for name, said in known.items() if said["metavar"] == "NAME=PATH"} | set(step.places)
    written = {name for name, said in known.items() if said["path"] == "writes"}
    for name, value in {**step.places, **step.options}.items():
        for one in value if isinstance(value, list) else [value]:
            # A list of experts may be a file, too.
            if name not in written and (isinstance(one, Path) or name in named or _is_file(one)):
                yield from dict.fromkeys(part for part in (str(one), str(one).partition("=")[2]) if part)


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".json")
