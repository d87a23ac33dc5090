"""The folder in which a run collects its output, and the journal that lets a later run go on from there.

    .NAME.moetools-staging/
        lock             held (flock) while a run writes
        journal.jsonl    first the plan, then a line per finished unit, one for units that are made again, one when
                         joining starts, one per joined file, one at publishing
        units/           one safetensors file per finished unit
        contents/        becomes the output
        replaced/        the overwritten output, for an instant, where folders cannot be exchanged

A journal line is written only after what it speaks of is durable, so every line can be believed after a crash. It holds
a digest of the file it speaks of: a run that goes on from there makes anew what has changed since. No link inside the
folder is followed.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moetools.checkpoint.durable import replace_folder, sync_folder, sync_tree, write_durably
from moetools.checkpoint.headers import read_header
from moetools.checkpoint.lock import lock_folder
from moetools.checkpoint.output import staging_path
from moetools.checkpoint.plan import canonical, differences, plan_digest, short
from moetools.checkpoint.shards import file_digest
from moetools.errors import CheckpointError, UserError

_LOG = logging.getLogger(__name__)
_VERSION = 2


@dataclass(frozen=True)
class UnitRecord:
    """A finished unit: its file in units/, what that must look like, and the JSON the caller stored with it."""

    unit: str
    file: str
    file_bytes: int
    header_digest: str
    digest: str
    payload: dict[str, Any]


@dataclass(frozen=True)
class ShardRecord:
    """A final file in contents/: the units it is made of and what it must look like."""

    file: str
    units: tuple[str, ...]
    file_bytes: int
    header_digest: str


class Staging:
    """Exclusive use of the staging folder of one output.

    Attributes:
        path: the staging folder.
        contents: the folder inside it that becomes the output.
        scratch: a folder inside it for what only the run itself needs again after an interruption.
        units: finished units in the order of their first writing; None for one whose file is gone or damaged.
        shards: the final files, once joining has started.
        tensor_names: tensors of each finished unit.
    """

    def __init__(self, out: Path) -> None:
        """Takes the lock.

        Raises:
            UserError: another run holds it.
            CheckpointError: the folder is not ours.
            OSError: from the file system.
        """
        self._out = Path(os.path.realpath(out))
        self.path = staging_path(out)
        self.contents = self.path / "contents"
        self.scratch = self.path / "scratch"
        self._unit_folder = self.path / "units"
        self._replaced = self.path / "replaced"
        self._journal = self.path / "journal.jsonl"
        self.units: dict[str, UnitRecord | None] = {}
        self.shards: tuple[ShardRecord, ...] = ()
        self.tensor_names: dict[str, frozenset[str]] = {}
        self._joined: dict[str, str] = {}
        self._lines = 0
        self._emptied = False
        self._check_ours()
        self._lock = lock_folder(self.path, "lock", self._out)

    def begin(self, plan: Mapping[str, Any], resume: bool, overwrite: bool = False) -> None:
        """Continues the interrupted run with the same plan (`resume`) or starts afresh.

        Raises:
            UserError: `resume` with another plan; finished work of an interrupted run would be thrown away, and neither
                `resume` nor `overwrite` was asked for.
            CheckpointError: the journal is damaged.
            OSError: from the file system.
        """
        try:
            if self._replaced.exists() and not self._out.exists():
                self._replaced.rename(self._out)
            if not (resume and self._journal.exists() and self._continue(plan)):
                self._start(plan, keep_finished=not (resume or overwrite))
        except BaseException:
            if self._journal.exists() and not self._emptied:
                self.release()
            else:
                self.discard()
            raise

    @property
    def finished(self) -> frozenset[str]:
        """Units whose tensors are safely on disk."""
        return frozenset(unit for unit, record in self.units.items() if record is not None)

    def next_unit_file(self) -> Path:
        """A file name in units/ that no journal line uses."""
        return self._unit_folder / f"{self._lines:06d}.safetensors"

    def unit_file(self, unit: str) -> Path:
        """The file of a finished unit that is not joined yet."""
        record = self.units[unit]
        assert record is not None, unit
        return self._unit_folder / record.file

    def record_unit(self, record: UnitRecord, tensor_names: frozenset[str]) -> None:
        """Makes the unit's file name durable and journals the unit."""
        sync_folder(self._unit_folder)
        self._append({"unit": asdict(record)})
        self.units[record.unit] = record
        self.tensor_names[record.unit] = tensor_names

    def forget(self, units: Iterable[str]) -> None:
        """Journals that these units, finished or not, will be made again; they keep their places in the order."""
        again = [unit for unit in units if self.units.get(unit) is not None]
        if again:
            self._append({"again": again})
        for unit in again:
            self.units[unit] = None
            self.tensor_names.pop(unit, None)

    def record_joined(self, shard: ShardRecord, digest: str) -> None:
        """Journals a final file that is complete."""
        self._append({"joined": shard.file, "digest": digest})
        self._joined[shard.file] = digest

    def record_shards(self, shards: tuple[ShardRecord, ...]) -> None:
        """Journals how units become final files; from here on unit files may disappear."""
        self._append({"shards": [asdict(shard) for shard in shards]})
        self.shards = shards

    def shard_done(self, shard: ShardRecord) -> bool:
        """Whether the final file is complete."""
        return shard.file in self._joined

    def publish(self, overwrite: bool) -> None:
        """Makes contents/ durable and puts it in the place of the output in one step."""
        sync_tree(self.contents)
        # After the exchange contents/ holds the old output; its inode tells a later run that this happened.
        self._append({"publish": self.contents.stat().st_ino})
        if overwrite and self._out.exists():
            replace_folder(self.contents, self._out, self._replaced)
        else:
            self.contents.rename(self._out)
        sync_folder(self._out.parent)

    def discard(self) -> None:
        """Removes the staging folder and gives the lock back. What cannot be removed is named, for the next run."""
        folders = (self._unit_folder, self.contents, self.scratch, self._replaced)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        kept = any(folder.exists() for folder in folders)
        try:
            # While a folder is left, the journal tells whose it is.
            if not kept:
                for name in ("journal.jsonl", "journal.jsonl.new", "lock"):
                    (self.path / name).unlink(missing_ok=True)
        except OSError:
            kept = True
        self._lock.close()
        try:
            self.path.rmdir()
        except OSError as error:
            # Not empty or gone when another run has just taken the folder over.
            kept = kept or error.errno not in (errno.ENOTEMPTY, errno.ENOENT)
        if kept:
            _LOG.warning("'%s' cannot be removed; the next run on '%s' will try again", self.path, self._out)

    def release(self) -> None:
        """Gives the lock back and leaves everything for a later run with `resume`."""
        self._lock.close()

    def sweep(self) -> None:
        """Discards what a run left that died behind its last step, with the output complete; else only releases."""
        try:
            over = not self._journal.exists() or self._published(self._read_journal())
        except BaseException:
            self.release()
            raise
        self.discard() if over else self.release()

    def _check_ours(self) -> None:
        if not self.path.exists() and not self.path.is_symlink():
            return
        known = self.path.is_dir() and not self.path.is_symlink()
        entries = list(self.path.iterdir()) if known else []
        if known and not self._journal.is_file():
            known = {entry.name for entry in entries} <= {"lock", "journal.jsonl.new"}
        links = [entry.name for entry in entries if entry.is_symlink()]
        if links or not known:
            what = f"holds the link '{links[0]}'" if links else "is not a staging folder of moetools"
            raise CheckpointError(f"'{self.path}' {what}", hint="move it out of the way")

    def _start(self, plan: Mapping[str, Any], *, keep_finished: bool) -> None:
        if keep_finished and self._journal.exists():
            self._refuse_to_lose()
        self._emptied = True
        # The old journal goes last, so that a kill in between leaves a folder that is recognised as ours.
        for folder in (self._unit_folder, self.contents, self.scratch, self._replaced):
            if folder.exists():
                shutil.rmtree(folder)
        self.units, self.shards, self.tensor_names, self._joined, self._lines = {}, (), {}, {}, 1
        header = {"moetools_journal": _VERSION, "digest": plan_digest(plan), "plan": canonical(plan)}
        write_durably(self._journal, _line(header))
        for folder in (self._unit_folder, self.contents, self.scratch):
            folder.mkdir()
        sync_folder(self.path)

    def _refuse_to_lose(self) -> None:
        """Finished layers are hours of work: they are thrown away only if that was asked for."""
        try:
            records = self._read_journal()[1:]
        except CheckpointError:
            return
        count = len({record["unit"]["unit"] for record in records if "unit" in record})
        # Checkpoints on the way to the output, whole or not, and those of a training.
        folders = [entry for entry in self.scratch.iterdir() if entry.is_dir()] if self.scratch.is_dir() else []
        count += sum(any(folder.rglob("*.safetensors")) for folder in folders)
        if count and not any("publish" in record for record in records):
            raise UserError(
                f"an interrupted run left {count} finished parts of '{self._out}' in '{self.path}'",
                hint="`resume` goes on from there with the same settings, `overwrite` throws them away",
            )

    def _continue(self, plan: Mapping[str, Any]) -> bool:
        """Takes over what the interrupted run finished; False when it had already published its output."""
        header, *records = self._read_journal()
        if header["digest"] != plan_digest(plan):
            changes = "; ".join(differences(header["plan"], canonical(plan)))
            message = f"cannot resume '{self._out}': the interrupted run had other settings: {changes}"
            raise UserError(message, hint="repeat its settings, or start afresh without `resume`")
        self._lines = 1 + len(records)
        if self._published(records):
            return False
        for record in records:
            self._take(record)
        for folder in (self._unit_folder, self.contents, self.scratch):
            folder.mkdir(exist_ok=True)
        self._verify_content()
        self._remove_unfinished()
        return True

    def _published(self, records: Iterable[Mapping[str, Any]]) -> bool:
        inode = self.contents.stat().st_ino if self.contents.is_dir() else None
        return any(record.get("publish", inode) != inode for record in records)

    def _take(self, record: dict[str, Any]) -> None:
        """What one line of the journal says."""
        try:
            if "unit" in record:
                unit = UnitRecord(**record["unit"])
                self.units[unit.unit] = unit
            if "again" in record:
                self.units |= dict.fromkeys(record["again"])
            if "shards" in record:
                shards = (ShardRecord(**shard | {"units": tuple(shard["units"])}) for shard in record["shards"])
                self.shards = tuple(shards)
            if "joined" in record:
                self._joined[record["joined"]] = record["digest"]
            _check_types(self.units.values(), self.shards)
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"a line that says {short(record)}") from error

    def _read_journal(self) -> list[dict[str, Any]]:
        data = self._journal.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            records = [json.loads(line) for line in whole.splitlines()]
        except (ValueError, RecursionError) as error:
            raise self._damaged(str(error)) from error
        if not all(isinstance(record, dict) for record in records):
            raise self._damaged("a line that is no object")
        header = records[0] if records else {}
        if header.get("moetools_journal") != _VERSION or not {"digest", "plan"} <= header.keys():
            message = f"{self._journal}: written by another version of moetools"
            raise CheckpointError(message, hint="start afresh with `overwrite` instead of `resume`")
        if len(whole) < len(data):
            # The last line was being written when the run died.
            os.truncate(self._journal, len(whole))
        return records

    def _damaged(self, what: str) -> CheckpointError:
        message = f"{self._journal}: damaged: {what}"
        return CheckpointError(message, hint="start afresh with `overwrite` instead of `resume`")

    def _verify_content(self) -> None:
        """Keeps what is byte for byte what the journal says; a unit whose file has changed will be made again."""
        for shard in self.shards:
            file = self.contents / shard.file
            if shard.file in self._joined and not _has_digest(file, shard.file_bytes, self._joined[shard.file]):
                del self._joined[shard.file]
        joined = {unit for shard in self.shards if self.shard_done(shard) for unit in shard.units}
        for unit, record in self.units.items():
            if record is None:
                continue
            file = self._unit_folder / record.file
            if _has_digest(file, record.file_bytes, record.digest):
                self.tensor_names[unit] = frozenset(info.name for info in read_header(file).tensors)
            elif unit in joined:
                self.tensor_names[unit] = frozenset()
            else:
                self.units[unit] = None

    def _remove_unfinished(self) -> None:
        """Sidecars and the like are written again; only shards are worth keeping."""
        keep = {shard.file for shard in self.shards if self.shard_done(shard)}
        for entry in list(self.contents.iterdir()):
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in keep:
                entry.unlink()

    def _append(self, record: dict[str, Any]) -> None:
        with self._journal.open("ab") as stream:
            stream.write(_line(record))
            stream.flush()
            os.fsync(stream.fileno())
        self._lines += 1


def _has_digest(file: Path, file_bytes: int, digest: str) -> bool:
    if file.is_symlink() or not file.is_file() or file.stat().st_size != file_bytes:
        return False
    return file_digest(file) == digest


def _check_types(units: Iterable[UnitRecord | None], shards: Iterable[ShardRecord]) -> None:
    """Raises ValueError for a record whose names are not file names of the staging folder, or values of other types."""
    for unit in units:
        if unit is not None and not (
            _is_name(unit.file) and isinstance(unit.unit, str) and isinstance(unit.payload, dict)
        ):
            raise ValueError(unit)
    for shard in shards:
        if not (_is_name(shard.file) and all(isinstance(unit, str) for unit in shard.units)):
            raise ValueError(shard)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, separators=(",", ":"), ensure_ascii=True) + "\n").encode()
