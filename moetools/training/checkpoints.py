"""Checkpoints of a training: each is whole or not there, and a failing disk leaves those that are finished."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from moetools.checkpoint.durable import sync_folder, sync_tree
from moetools.errors import CheckpointError

_PREFIX = "checkpoint-"
_STAGED = "saving"
_KEPT = 2


def step_of(checkpoint: Path) -> int:
    """The step behind which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def finished(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, the newest first."""
    found = [one for one in folder.glob(f"{_PREFIX}*") if one.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose record can be read; None without any."""
    for one in finished(folder):
        try:
            json.loads((one / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return one
    return None


@contextlib.contextmanager
def saving(folder: Path, *, publishes: bool) -> Iterator[Path]:
    """A folder in which a checkpoint is written; it gets its place in `folder` when the context ends well.

    Args:
        publishes: this process does that; of several that write together one does.

    Raises:
        CheckpointError: disk full or failing; earlier checkpoints are as they were.
    """
    staged = folder / _STAGED
    try:
        if publishes:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
        yield staged
        if publishes:
            _publish(staged, folder)
    # torch.save reports a full disk as a RuntimeError of its archive writer.
    except (OSError, RuntimeError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "disk full" if full else " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"saving a checkpoint of the training in '{folder}' failed: {reason}",
            hint="free some space; run again with `resume`: finished checkpoints are kept",
        ) from error


def _publish(staged: Path, folder: Path) -> None:
    sync_tree(staged)
    for one in staged.iterdir():
        target = folder / one.name
        shutil.rmtree(target, ignore_errors=True)
        one.rename(target)
    sync_folder(folder)
    for old in finished(folder)[_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
