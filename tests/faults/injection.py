"""What goes wrong inside a run: each function installs a fault in this process, a forked child that ends with it.

A step is a call of a function of `os` that changes files; a journal step is the writing of one line of the journal.
"""

import errno
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moetools.checkpoint import durable, staging
from moetools.checkpoint.staging import Staging
from moetools.forward.stock import StockModel

STEPS = ("fsync", "rename", "mkdir", "unlink", "rmdir", "truncate")
PHASES = ("before", "torn", "behind")
DAMAGES = ("flip", "config", "truncate", "vanish")


class Counted:
    """Counts the steps of this process, and acts before one of them, or before it and all that follow."""

    def __init__(self, at: int = 0, action: Callable[[], None] = lambda: None, *, lasting: bool = False) -> None:
        self.steps = self.lines = self.reads = 0
        self._at, self._action, self._lasting = at, action, lasting
        for name in STEPS:
            setattr(os, name, self._step(getattr(os, name), harmless=name in ("unlink", "rmdir")))
        durable.exchange = self._step(durable.exchange)
        Staging._append = self._line(Staging._append)
        StockModel.read_layer = self._read(StockModel.read_layer)

    def _step(self, function: Callable[..., Any], *, harmless: bool = False) -> Callable[..., Any]:
        def step(*args: Any, **more: Any) -> Any:
            self.steps += 1
            if self.steps == self._at or (self._lasting and not harmless and self.steps > self._at > 0):
                self._action()
            return function(*args, **more)

        return step

    def _line(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def line(*args: Any) -> Any:
            self.lines += 1
            return function(*args)

        return line

    def _read(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any) -> Any:
            self.reads += 1
            return function(*args)

        return read


def signal_at_step(number: int, which: int) -> None:
    """This process gets a signal before a step."""
    Counted(number, lambda: os.kill(os.getpid(), which))


def signal_at_line(number: int, phase: str, which: int) -> None:
    """This process gets a signal at a line of the journal: before it, when half of it is on disk, or behind it."""
    append, calls = Staging._append, [0]

    def line(self: Staging, record: dict[str, Any]) -> None:
        calls[0] += 1
        if calls[0] == number and phase == "before":
            os.kill(os.getpid(), which)
        if calls[0] == number and phase == "torn":
            data = staging._line(record)
            with self._journal.open("ab") as stream:
                stream.write(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, record)
        if calls[0] == number and phase == "behind":
            os.kill(os.getpid(), which)

    Staging._append = line


def failing_disk(number: int, code: int, *, lasting: bool) -> None:
    """A step fails; with `lasting`, so does every later one but deleting."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    Counted(number, fail, lasting=lasting)


def limited_files(most_bytes: int) -> None:
    """No file may get longer."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))


def full_disk(most_bytes: int) -> None:
    """Nothing more can be written once that many bytes were, whoever writes them with `os.write` or a stream."""
    left = [most_bytes]
    open_ = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        stream = open_(self, mode, *args, **more)
        if not set(mode) & set("wax+"):
            return stream
        write = stream.write

        def limited(data: Any) -> int:
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
            return write(data)

        return _Stream(stream, limited)

    Path.open = opened


class _Stream:
    """A stream with another `write`."""

    def __init__(self, stream: Any, write: Callable[[Any], int]) -> None:
        self._stream, self.write = stream, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> "_Stream":
        self._stream.__enter__()
        return self

    def __exit__(self, *what: Any) -> Any:
        return self._stream.__exit__(*what)


def short_reads(seed: int) -> None:
    """A read gives less than what was asked for, as a network's file system may."""
    rng, pread, open_ = random.Random(seed), os.pread, Path.open

    def some(count: int) -> int:
        return max(1, count // rng.choice((1, 2, 3)))

    def opened(self: Path, mode: str = "r", buffering: int = -1, *args: Any, **more: Any) -> Any:
        stream = open_(self, mode, buffering, *args, **more)
        if buffering != 0 or mode != "rb":
            return stream
        readinto = stream.readinto
        short = _Stream(stream, stream.write)
        short.readinto = lambda buffer: readinto(memoryview(buffer)[: some(len(buffer))])
        return short

    os.pread = lambda descriptor, count, offset: pread(descriptor, some(count), offset)
    Path.open = opened


def damaged_at_read(number: int, model: Path, damage: str) -> None:
    """The model that is read is damaged before a layer of it is read."""
    read, calls = StockModel.read_layer, [0]

    def reading(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            damage_model(model, damage)
        return read(*args)

    StockModel.read_layer = reading


def damage_model(model: Path, damage: str) -> None:
    """Change a model in place, as a careless copy over it would."""
    file = model / "model.safetensors"
    if damage == "config":
        text = (model / "config.json").read_text()
        (model / "config.json").write_text(text.replace("{", '{\n  "changed": true,', 1))
    elif damage == "truncate":
        os.truncate(file, file.stat().st_size // 3)
    elif damage == "vanish":
        file.unlink()
    else:
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            (last,) = stream.read(1)
            stream.seek(-1, os.SEEK_END)
            stream.write(bytes([last ^ 4]))
