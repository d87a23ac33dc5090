"""Runs a writing verb in forked children, breaks some of them, and checks what is left.

What must hold behind every run, however it ended: inputs are as they were; OUT is absent or complete; beside it is
nothing but the staging folder, and an ending that could speak has said so. A resumed run ends with the same weights.
"""

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import typer
from injection import Counted, damage_model
from writing_verbs import CASES, CHAINS, Material

from moetools.cli.console import Session
from moetools.pipeline.options import Writing

Fault = Callable[[], None]
STAGING = ".out.moetools-staging"
EVERY = CASES | CHAINS
DEADLINE = 60
_VERIFIED = 0.08
"""Share of trials whose last run verifies."""
CLEAN, FAILED = 0, 1


class LostError(Exception):
    """Something was lost: a promise that does not hold."""


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run of a verb: digests of the weights, how much of what it did, and its `Case` says the rest."""

    weights: dict[str, str]
    seconds: float
    steps: int
    lines: int
    reads: int
    longest_file: int
    bytes: int
    beside: str = STAGING
    grows: bool = False

    def is_part(self, found: dict[str, str]) -> bool:
        """Whether nothing is there that a whole run does not make, but for what a chain cleans away later."""
        if self.grows:
            folders = {name.partition("/")[0] for name in self.weights}
            found = {name: kept for name, kept in found.items() if name.partition("/")[0] in folders}
        return found.items() <= self.weights.items() and (self.grows or found == self.weights)


@dataclass(frozen=True)
class Ended:
    """How a child ended: `code` is its exit code, or minus the signal that ended it."""

    code: int
    said: str


@dataclass
class Place:
    """A folder of its own for one trial."""

    material: Material
    folder: Path
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "run" / "out"

    def __enter__(self) -> "Place":
        self.folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="trial-"))
        for name in ("run", "tmp"):
            (self.folder / name).mkdir()
        self.digests = tree(self.material.folder)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def check(self, ended: Ended, reference: Reference, *, inputs: bool = True) -> None:
        """Raises LostError."""
        if inputs and tree(self.material.folder) != self.digests:
            raise LostError("an input changed")
        entries = {entry.name for entry in self.out.parent.iterdir()}
        whole = "out" in entries and weights(self.out) == reference.weights
        if "out" in entries and not whole and (ended.code == CLEAN or not reference.is_part(weights(self.out))):
            raise LostError("OUT is not complete, or has other weights")
        beside = reference.beside
        if entries - {"out", beside}:
            raise LostError(f"left behind: {sorted(entries - {'out', beside})}")
        if "internal error" in ended.said or "Traceback" in ended.said:
            raise LostError(f"said: {ended.said.strip()[-300:]}")
        if ended.code < 0:
            if -ended.code not in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
                raise LostError(f"died of {signal.Signals(-ended.code).name}")
            return
        if ended.code == CLEAN and entries != {"out"} and "cannot be removed" not in ended.said:
            raise LostError(f"ended well and left {sorted(entries)}")
        if ended.code != CLEAN and beside in entries and not told(ended.said):
            raise LostError(f"left a folder without a word: {ended.said.strip()[-300:]}")
        left = [entry.name for entry in (self.folder / "tmp").iterdir()]
        if left:
            raise LostError(f"temporary files are left: {left}")


def told(said: str) -> bool:
    return any(word in said for word in ("resume", "overwrite", "moetools-"))


def measured(verb: str, material: Material, folder: Path) -> Reference:
    """The reference of a verb."""
    with Place(material, folder) as place:
        counts = place.folder / "counts"

        def count() -> None:
            counted = Counted()
            behind.append(lambda: counts.write_text(json.dumps([counted.steps, counted.lines, counted.reads])))

        behind: list[Callable[[], Any]] = []
        start = time.monotonic()
        ended = finished(started(verb, place, Writing(verify=False), fault=count, behind=behind))
        if ended.code:
            raise SystemExit(f"{verb}: {ended.said}")
        steps, lines, reads = json.loads(counts.read_text())
        sizes = [file.stat().st_size for file in place.out.rglob("*.safetensors")]
        seconds, case = time.monotonic() - start, EVERY[verb]
        counted = (steps, lines, reads, max(sizes), sum(sizes))
        return Reference(weights(place.out), seconds, *counted, beside=case.beside, grows=case.grows)


def kill_chain(verb: str, place: Place, reference: Reference, faults: list[Any], rng: random.Random) -> int:
    """One run per fault, each going on from the last, then one without; returns how many faults struck.

    A fault is a function to install, or a pair (seconds, signal) that the parent sends. The last run verifies now and
    then, which costs more than all the others.
    """
    struck = 0
    how = Writing(verify=False)
    for fault in faults:
        ended = attempt(verb, place, how, fault, threads=rng.randint(1, EVERY[verb].threads))
        place.check(ended, reference)
        if ended.code == CLEAN or (place.out.exists() and not reference.grows):
            struck += ended.code != CLEAN
            break
        struck += 1
        how = Writing(verify=False, resume=True)
    verify = rng.random() < _VERIFIED
    ended = attempt(verb, place, Writing(verify=verify, resume=True), None, threads=rng.randint(1, EVERY[verb].threads))
    place.check(ended, reference)
    complete = "it is complete" in ended.said
    if not place.out.exists() or (ended.code != CLEAN and not complete):
        raise LostError(f"cannot be resumed: {ended.said.strip()[-300:]}")
    if [entry.name for entry in place.out.parent.iterdir()] != ["out"]:
        raise LostError("a staging folder is left beside a complete OUT")
    return struck


def source_fault(verb: str, place: Place, reference: Reference, fault: Any, *, surely: bool) -> int:
    """The input changes; `surely` while it is read. The run is refused, or it was too late to matter."""
    ended = attempt(verb, place, Writing(verify=False), fault, threads=1)
    if ended.code == CLEAN and surely:
        raise LostError("an output was made of an input that changed meanwhile")
    meant = reference.weights
    if ended.code == CLEAN and weights(place.out) != meant:
        # It changed before it was opened: the output must be that of the changed input.
        found = place.out.rename(place.folder / "found")
        attempt(verb, place, Writing(verify=False), None)
        meant = weights(place.out) if place.out.exists() else {}
        shutil.rmtree(place.out, ignore_errors=True)
        found.rename(place.out)
    place.check(ended, replace(reference, weights=meant), inputs=False)
    return 1


def two_runs(verbs: tuple[str, str], place: Place, references: tuple[Reference, Reference], pause: float) -> int:
    """Two runs on one OUT: at least one of them makes it, whole, and the other is refused."""
    first = started(verbs[0], place, Writing(verify=False))
    time.sleep(pause)
    second = started(verbs[1], place, Writing(verify=False), said="said-2")
    both = [finished(first), finished(second, "said-2")]
    made = [one for one, ended in zip(references, both, strict=True) if ended.code == CLEAN]
    if len(made) != 1 and not (made and references[0].grows):
        raise LostError(f"{len(made)} of two runs ended well: {[ended.said.strip()[-200:] for ended in both]}")
    for ended in both:
        place.check(ended, made[0])
    if [entry.name for entry in place.out.parent.iterdir()] != ["out"]:
        raise LostError("a staging folder is left beside a complete OUT")
    return 1


def attempt(verb: str, place: Place, how: Writing, fault: Any, *, threads: int = 1) -> Ended:
    """One run under a fault."""
    if isinstance(fault, tuple):
        child = started(verb, place, how, threads=threads)
        time.sleep(fault[0])
        with contextlib.suppress(ProcessLookupError):
            fault[1](child[0]) if callable(fault[1]) else os.kill(child[0], fault[1])
        return finished(child)
    return finished(started(verb, place, how, fault=fault, threads=threads))


def started(
    verb: str,
    place: Place,
    how: Writing,
    *,
    fault: Fault | None = None,
    threads: int = 1,
    said: str = "said",
    behind: list[Callable[[], Any]] | None = None,
) -> tuple[int, Path]:
    """A child that runs the verb as the command line would; its words go to a file."""
    file = place.folder / said
    file.unlink(missing_ok=True)
    child = os.fork()
    if child:
        return child, file
    code = 99
    try:
        code = _run(verb, place, how, fault, threads, file, [] if behind is None else behind)
    finally:
        os._exit(code)


def _run(
    verb: str, place: Place, how: Writing, fault: Fault | None, threads: int, file: Path, behind: list[Any]
) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = str(place.folder / "tmp")
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    os.dup2(descriptor, 1)
    sys.stderr = sys.stdout = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(threads)
    code = CLEAN
    try:
        with Session(as_json=True, quiet=False, debug=False, resume="run it again with --resume"):
            if fault is not None:
                fault()
            EVERY[verb].run(place.material, place.out, how)
    except typer.Exit as ending:
        code = ending.exit_code
    except BaseException as error:  # noqa: BLE001 - a signal between the runs; the parent judges it
        sys.stderr.write(f"outside the session: {type(error).__name__}: resume\n")
        code = FAILED
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for action in behind:
        action()
    sys.stderr.flush()
    return code


def finished(child: tuple[int, Path], said: str = "") -> Ended:
    """Wait for a child. Raises LostError: it hangs."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        found, status = os.waitpid(child[0], os.WNOHANG)
        if found:
            words = child[1].read_text(errors="replace") if child[1].exists() else ""
            return Ended(os.waitstatus_to_exitcode(status), words)
        time.sleep(0.003)
    os.kill(child[0], signal.SIGKILL)
    os.waitpid(child[0], 0)
    raise LostError(f"hangs: over {DEADLINE} s")


def weights(folder: Path) -> dict[str, str]:
    """Digests of what determines the model."""
    found = {path for kind in ("*.safetensors", "config.json", "task_routing.json") for path in folder.rglob(kind)}
    named = {str(path.relative_to(folder)): path for path in sorted(found)}
    return {name: digest(path) for name, path in named.items() if "-staging" not in name}


def tree(folder: Path) -> dict[str, str]:
    return {str(path): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def damaging(model: Path, damage: str) -> Callable[[int], None]:
    """For a pair (seconds, action): the parent damages the model."""
    return lambda _: damage_model(model, damage)
