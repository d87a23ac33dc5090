"""Whether an output folder can be written, checked before any expensive work."""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from moetools.errors import CheckpointError, UserError
from moetools.sizes import format_bytes

DEFAULT_SHARD_BYTES = 2 * 1024**3

_SLACK = 1.05


def staging_path(out: Path) -> Path:
    """The folder beside `out`, on the same file system, in which a run collects its output."""
    target = Path(os.path.realpath(out))
    return target.with_name(f".{target.name}.moetools-staging")


def check_output(
    out: Path,
    overwrite: bool,
    resume: bool,
    expected_bytes: int,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Checks that a checkpoint of `expected_bytes` can be written to `out`. Changes nothing on disk.

    Space needed: the tensors, 5 % for what comes with them, and one shard that is joined while its parts still exist.
    Bytes of an earlier interrupted run count as free: they are reused with `resume` and deleted without.

    Raises:
        UserError: `out` exists and not `overwrite`, or is no checkpoint; its parent is missing or read-only.
        CheckpointError: not enough free space.
    """
    target = Path(os.path.realpath(out))
    if not target.parent.is_dir():
        raise UserError(f"cannot write '{out}': the folder '{target.parent}' does not exist", hint="create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write '{out}': no permission to write in '{target.parent}'")
    check_replaceable(out, overwrite, resume)
    needed = int(expected_bytes * _SLACK) + min(expected_bytes, max_shard_bytes)
    free = shutil.disk_usage(target.parent).free + _tree_bytes(staging_path(out))
    if needed > free:
        have = format_bytes(free)
        message = f"writing '{out}' needs {format_bytes(needed)}, but {have} are free in '{target.parent}'"
        raise CheckpointError(message, hint="free some space or choose an output on another disk")


def check_replaceable(out: Path, overwrite: bool, resume: bool) -> None:
    """Raises UserError unless `out` is absent, or is an empty folder or a checkpoint that may be overwritten."""
    target = Path(os.path.realpath(out))
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"cannot write '{out}': it is a file", hint="the output is a folder; choose another name")
    if not overwrite:
        # A run that was killed after its last step left a complete output, so --resume does not help either.
        complete = " (it is complete; nothing is left to resume)" if resume else ""
        raise UserError(f"output '{out}' exists{complete}", hint="choose another name, or replace it with `overwrite`")
    looks_right = (target / "config.json").is_file() or (target / "moetools.json").is_file()
    if not looks_right and any(target.iterdir()):
        message = f"refusing to overwrite '{out}': it is not empty and holds neither config.json nor moetools.json"
        raise UserError(message, hint="delete it yourself if that is what you want")


def check_file(option: str, file: Path) -> None:
    """Whether a file beside the output can be written.

    Raises:
        UserError: naming the option; it is a folder, or lies in none.
    """
    folder = file.absolute().parent
    if file.is_dir():
        raise UserError(f"`{option}`: '{file}' is a directory", hint="name a file")
    if not folder.is_dir():
        raise UserError(f"`{option}`: the folder '{folder}' does not exist", hint="make it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"`{option}`: the folder '{folder}' cannot be written to")


def check_apart(writes: Mapping[str, Path], reads: Mapping[str, Path]) -> None:
    """Refuses a run whose outputs and inputs touch.

    No path that it writes, replaces or deletes may be, contain, or lie inside one that it reads, after resolving links.
    A folder of links (the Hugging Face cache) keeps its files elsewhere: those are read as well. Two outputs may not
    touch either.

    Args:
        writes, reads: what each path is ("output", "teacher", ...) -> path; those that are read need not exist.

    Raises:
        UserError: naming both paths.
    """
    places = [(role, path, place) for role, path in reads.items() for place in _places(path)]
    for what, written in writes.items():
        others = [(role, path, real(path)) for role, path in writes.items() if role != what]
        for role, path, place in [*places, *others]:
            relation = _relation(real(written), place)
            if relation:
                raise UserError(
                    f"{what} '{written}' {relation} {role} '{path}'",
                    hint="choose another place for it; what a run reads is never changed",
                )


def _places(path: Path) -> list[Path]:
    """Where a path that is read really lies: itself, and what the files of a folder link to."""
    found = {real(path)}
    if path.is_dir():
        found |= {real(entry) for entry in path.iterdir() if entry.is_symlink()}
    return sorted(found)


def _relation(written: Path, read: Path) -> str:
    if written == read:
        return "is"
    if read in written.parents:
        return "lies inside"
    return "contains" if written in read.parents else ""


def real(path: Path) -> Path:
    """The absolute path without links, whether it exists or not."""
    return Path(os.path.realpath(path))


def _tree_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            # A run that is still writing there deletes files as it goes; its lock is found out later.
            with suppress(FileNotFoundError):
                total += (Path(parent) / name).lstat().st_size
    return total
