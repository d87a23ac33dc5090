"""Failures and kills at every step leave the output absent, as it was, or complete; resuming gives the same bytes."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import random_bytes, toy_units, tree_digest, write_all, write_model

from moetools.checkpoint import durable, writer
from moetools.checkpoint.output import staging_path
from moetools.checkpoint.reader import open_checkpoint
from moetools.checkpoint.writer import CheckpointWriter
from moetools.errors import CheckpointError, UserError

SHARDS = {"one file": 2**31, "joined and single": 2600, "a shard per unit": 1}
STEPS = ("fsync", "rename", "mkdir", "unlink", "rmdir", "pread", "truncate")


class StepCounter:
    """Replaces the functions of `os` that the writer goes through, and acts before the n-th call."""

    def __init__(self, at: int, action: Callable[[], None]) -> None:
        self.calls = 0
        self.at = at
        self.action = action

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                self.action()
            return function(*args, **kwargs)

        return step

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in STEPS:
            patch.setattr(os, name, self.wrap(getattr(os, name)))
        patch.setattr(durable, "exchange", self.wrap(durable.exchange))


def fail(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.fixture
def source(tmp_path: Path) -> Any:
    write_model(tmp_path / "in", {"model.safetensors": {"a": torch.ones(3)}})
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    return open_checkpoint(tmp_path / "in")


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a kill loses nothing that fsync would save, and fsync is free there."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


def count_steps(out: Path, **options: Any) -> int:
    counter = StepCounter(0, fail(AssertionError()))
    with pytest.MonkeyPatch.context() as patch:
        counter.install(patch)
        write_all(out, toy_units(), **options)
    return counter.calls


def outcome(out: Path, **options: Any) -> BaseException | None:
    try:
        write_all(out, toy_units(), **options)
    except (CheckpointError, KeyboardInterrupt) as error:
        return error
    return None


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("shards", SHARDS)
def test_failure_at_every_step(memory_disk: Path, source: Any, shards: str, overwrite: bool) -> None:
    options = {"source": source, "max_shard_bytes": SHARDS[shards]}
    steps = count_steps(memory_disk / "reference", **options)
    reference = tree_digest(memory_disk / "reference")
    errors = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error"), KeyboardInterrupt()]
    assert steps > 25
    for at in range(1, steps + 1):
        out = memory_disk / f"out{at}"
        if overwrite:
            write_model(out, {"model.safetensors": {"old": torch.ones(1)}})
        old = tree_digest(out)
        error = errors[at % 3]
        with pytest.MonkeyPatch.context() as patch:
            StepCounter(at, fail(error)).install(patch)
            caught = outcome(out, overwrite=overwrite, **options)
        # None: the error came while the published run was tidying up.
        assert caught is None or isinstance(caught, type(error) if at % 3 == 2 else CheckpointError)
        assert caught is None or ("disk full" in str(caught)) == (at % 3 == 0)
        if tree_digest(out) != reference:
            assert tree_digest(out) == old
            write_all(out, toy_units(), overwrite=overwrite, resume=True, **options)
        assert tree_digest(out) == reference
        shutil.rmtree(staging_path(out), ignore_errors=True)
        shutil.rmtree(out)
    assert tree_digest(source.path).keys() == {"config.json", "model.safetensors", "tokenizer.json"}


def interrupted(out: Path, after: int, **options: Any) -> Path:
    """The staging folder of a run that stopped after some of three units."""
    options = {"plan": {"method": "toy"}, "expected_bytes": 0} | options
    with CheckpointWriter(out, **options) as unfinished:
        for unit, tensors in list(toy_units().items())[:after]:
            unfinished.write_unit(unit, tensors, {"of": unit})
    return unfinished.staging


def test_a_resumed_run_writes_only_what_is_missing(tmp_path: Path) -> None:
    reference, everything = write_all(tmp_path / "reference", toy_units())
    assert everything == ["layer.0", "layer.1", "layer.2"]
    interrupted(tmp_path / "out", 2)
    out, written = write_all(tmp_path / "out", toy_units(), resume=True)
    assert written == ["layer.2"]
    assert tree_digest(out) == tree_digest(reference)


def test_finished_work_is_thrown_away_only_when_asked_to(tmp_path: Path) -> None:
    staging = interrupted(tmp_path / "out", 2)
    before = tree_digest(staging)
    with pytest.raises(UserError, match="an interrupted run left 2 finished parts") as caught:
        write_all(tmp_path / "out", toy_units())
    assert "`resume`" in caught.value.hint
    assert tree_digest(staging) == before
    _, written = write_all(tmp_path / "out", toy_units(), overwrite=True)
    assert len(written) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_resume_with_nothing_to_resume_starts(tmp_path: Path) -> None:
    _, written = write_all(tmp_path / "out", toy_units(), resume=True)
    assert len(written) == 3


def test_another_plan_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", 2, plan={"method": "reap", "options": {"keep": 4, "seed": 0}, "old": 1})
    before = tree_digest(tmp_path)
    with pytest.raises(UserError) as caught:
        write_all(
            tmp_path / "out", toy_units(), resume=True, plan={"method": "reap", "options": {"keep": 2, "seed": 0}}
        )
    assert caught.value.message.endswith("other settings: old: 1 -> (absent); options.keep: 4 -> 2")
    assert tree_digest(tmp_path) == before


def test_plans_are_equal_as_json(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", 2, plan={"a": (1, 2), "b": {"y": 1, "x": 2}})
    _, written = write_all(tmp_path / "out", toy_units(), resume=True, plan={"b": {"x": 2, "y": 1}, "a": [1, 2]})
    assert written == ["layer.2"]


@pytest.mark.parametrize("damage", ["missing", "shorter", "other header", "flipped bit"])
def test_a_damaged_unit_is_written_again_in_its_place(tmp_path: Path, damage: str) -> None:
    reference, _ = write_all(tmp_path / "reference", toy_units())
    file = sorted((interrupted(tmp_path / "out", 3) / "units").iterdir())[0]
    if damage == "missing":
        file.unlink()
    elif damage == "shorter":
        os.truncate(file, 600)
    elif damage == "other header":
        file.write_bytes(file.read_bytes().replace(b"layers.0.up", b"layers.0.UP"))
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with (
        CheckpointWriter(tmp_path / "out", plan={"method": "toy"}, expected_bytes=0, resume=True) as resumed,
        pytest.raises(ValueError, match=r"unit 'layer\.0' must be written again"),
    ):
        resumed.commit()
    out, written = write_all(tmp_path / "out", toy_units(), resume=True)
    assert written == ["layer.0"]
    assert tree_digest(out) == tree_digest(reference)


def test_a_torn_last_line_of_the_journal_is_dropped(tmp_path: Path) -> None:
    journal = interrupted(tmp_path / "out", 3) / "journal.jsonl"
    whole = journal.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for length in (last + 1, len(whole) - 1):
        journal.write_bytes(whole[:length])
        with CheckpointWriter(tmp_path / "out", plan={"method": "toy"}, expected_bytes=0, resume=True) as resumed:
            assert resumed.finished == {"layer.0", "layer.1"}
            resumed.write_unit("layer.2", toy_units()["layer.2"], {"of": "layer.2"})
        assert journal.read_bytes() == whole
    _, written = write_all(tmp_path / "out", toy_units(), resume=True)
    assert written == []


def test_nothing_is_written_twice_once_joining_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_shard_bytes": 2600}
    reference, _ = write_all(tmp_path / "reference", toy_units(6), **options)
    join, calls = writer.shards.join, []

    def second_fails(parts: Any, file: Path) -> str:
        calls.append(file)
        return fail_with_enospc() if len(calls) == 2 else join(parts, file)

    with monkeypatch.context() as patch:
        patch.setattr(writer.shards, "join", second_fails)
        with pytest.raises(CheckpointError, match="disk full"):
            write_all(tmp_path / "out", toy_units(6), **options)
    # The first shard took the place of its two units, so that joining needs little room.
    assert len(list((staging_path(tmp_path / "out") / "units").glob("*.safetensors"))) == 4
    out, written = write_all(tmp_path / "out", toy_units(6), resume=True, **options)
    assert written == []
    assert tree_digest(out) == tree_digest(reference)


@pytest.mark.parametrize("line", [b"{torn}\n", b'{"moetools_journal": 99}\n'])
def test_a_damaged_journal_is_reported(tmp_path: Path, line: bytes) -> None:
    journal = interrupted(tmp_path / "out", 2) / "journal.jsonl"
    journal.write_bytes(line + journal.read_bytes())
    with pytest.raises(CheckpointError, match=r"journal\.jsonl") as caught:
        write_all(tmp_path / "out", toy_units(), resume=True)
    assert caught.value.hint == "start afresh with `overwrite` instead of `resume`"
    write_all(tmp_path / "out", toy_units(), overwrite=True)


def test_a_line_of_the_journal_that_lacks_something_is_shown(tmp_path: Path) -> None:
    with (interrupted(tmp_path / "out", 2) / "journal.jsonl").open("ab") as stream:
        stream.write(b'{"joined":"x"}\n')
    with pytest.raises(CheckpointError, match=r'a line that says \{"joined": "x"\}'):
        write_all(tmp_path / "out", toy_units(), resume=True)


def test_units_that_changed_after_joining_began_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer.shards, "join", fail_with_enospc)
        with pytest.raises(CheckpointError, match="disk full") as caught:
            write_all(tmp_path / "out", toy_units())
    assert "`resume`: finished layers are kept" in caught.value.hint
    units = sorted((staging_path(tmp_path / "out") / "units").glob("*.safetensors"))
    units[1].unlink()
    other = toy_units() | {"layer.1": {"another": torch.ones(1)}}
    with pytest.raises(CheckpointError, match="changed while the run was interrupted"):
        write_all(tmp_path / "out", other, resume=True)


def fail_with_enospc(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_full_before_the_first_unit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.shards, "write_tensors", fail_with_enospc)
    with pytest.raises(CheckpointError, match="disk full") as caught:
        write_all(tmp_path / "out", toy_units())
    assert "resume" not in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "none", folder], check=False).returncode:
        pytest.skip("no permission to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    units = {f"u{i}": {f"t{i}": random_bytes((500_000,), torch.uint8, i)} for i in range(6)}
    options = {"expected_bytes": 0}
    with pytest.raises(CheckpointError, match="disk full") as caught:
        write_all(small_disk / "out", units, **options)
    assert caught.value.hint == "free some space and run again with `resume`: finished layers are kept"
    assert [entry.name for entry in small_disk.iterdir()] == [".out.moetools-staging"]
    with pytest.raises(CheckpointError, match=r"needs [\d.]+ [kM]B, but [\d.]+ [kM]?B are free"):
        write_all(small_disk / "out", units, resume=True, expected_bytes=200_000_000)
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    out, written = write_all(small_disk / "out", units, resume=True, **options)
    assert 0 < len(written) < 6
    found = open_checkpoint(out).read(f"t{i}" for i in range(6))
    assert all(torch.equal(found[f"t{i}"], units[f"u{i}"][f"t{i}"]) for i in range(6))


def run_and_die_at(at: int, out: Path, options: dict[str, Any]) -> None:
    patch = pytest.MonkeyPatch()
    StepCounter(at, lambda: os.kill(os.getpid(), signal.SIGKILL)).install(patch)
    write_all(out, toy_units(), **options)


def run_slowly(started: Any, out: Path, options: dict[str, Any]) -> None:
    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:
        fsync(descriptor)
        time.sleep(0.002)

    os.fsync = slow_fsync  # type: ignore[assignment]
    units = toy_units(30)
    started.send(True)
    write_all(out, units, **options)


@pytest.fixture(scope="module")
def processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moetools.checkpoint.writer", "safetensors.torch", "pytest"])
    return context


def test_kill_at_every_step(memory_disk: Path, source: Any, processes: Any) -> None:
    options = {"source": source, "max_shard_bytes": SHARDS["joined and single"], "overwrite": True}
    steps = count_steps(memory_disk / "reference", **options)
    new, before = tree_digest(memory_disk / "reference"), tree_digest(source.path)
    # The same tensor names and sizes as the new output: old weights must never be taken for finished new ones.
    old_units = {unit: {n: t + 1 for n, t in tensors.items()} for unit, tensors in toy_units().items()}
    write_all(memory_disk / "old", old_units, **options)
    old = tree_digest(memory_disk / "old")
    assert new.keys() == old.keys()
    published = 0
    for at in range(1, steps + 4):
        out = memory_disk / f"out{at}"
        shutil.copytree(memory_disk / "old", out)
        child = processes.Process(target=run_and_die_at, args=(at, out, options))
        child.start()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        found = tree_digest(out)
        assert found in (old, new)
        published += found == new
        write_all(out, toy_units(), resume=True, **options)
        assert tree_digest(out) == new
        assert not staging_path(out).exists()
    assert 0 < published < steps / 2
    assert tree_digest(source.path) == before


def test_kill_at_random_moments(memory_disk: Path, source: Any, processes: Any) -> None:
    options = {"source": source, "max_shard_bytes": 8000, "resume": True}
    receiver, sender = processes.Pipe(duplex=False)

    def start(out: Path) -> Any:
        child = processes.Process(target=run_slowly, args=(sender, out, options))
        child.start()
        receiver.recv()
        return child

    child = start(memory_disk / "reference")
    started = time.monotonic()
    child.join()
    duration = time.monotonic() - started
    reference, before = tree_digest(memory_disk / "reference"), tree_digest(source.path)
    draw = random.Random(7)
    resumed = 0
    for number in range(6):
        out = memory_disk / f"out{number}"
        for _ in range(draw.choice([1, 2])):
            child = start(out)
            time.sleep(draw.uniform(0.1, 0.6) * duration)
            child.kill()
            child.join()
            assert not out.exists() or tree_digest(out) == reference
            assert tree_digest(source.path) == before
            if out.exists():
                break
        if not out.exists():
            _, written = write_all(out, toy_units(30), **options)
            resumed += len(written) < 30
        assert tree_digest(out) == reference
    assert resumed > 0
    sender.close()
    receiver.close()


def test_the_journal_is_readable(tmp_path: Path) -> None:
    journal = interrupted(tmp_path / "out", 1) / "journal.jsonl"
    header, unit = [json.loads(line) for line in journal.read_text().splitlines()]
    assert header["plan"] == {"method": "toy"}
    assert unit["unit"]["payload"] == {"of": "layer.0"}
