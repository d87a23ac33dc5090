"""Writes an output unit by unit so that a killed run leaves it absent (or as it was) and can be resumed."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from moetools.checkpoint import shards
from moetools.checkpoint.durable import sync_folder, write_durably
from moetools.checkpoint.folder import INDEX_NAME
from moetools.checkpoint.headers import Header, read_header
from moetools.checkpoint.output import DEFAULT_SHARD_BYTES, check_output, check_replaceable
from moetools.checkpoint.reader import Checkpoint, natural_key
from moetools.checkpoint.staging import ShardRecord, Staging, UnitRecord
from moetools.errors import CheckpointError, DataError, StatisticsError, UnsupportedModelError, UserError

__all__ = ["DEFAULT_SHARD_BYTES", "CheckpointWriter", "OutputWriter", "check_output"]

_REFUSALS = (UserError, DataError, StatisticsError, UnsupportedModelError)
"""Errors that the same run would meet again."""


class OutputWriter:
    """Collects files in a staging folder beside `out` and publishes them in one step.

    Leaving the block without `commit` keeps the staging folder while it holds finished work, whatever the failure was.
    It is removed where there is none, or nothing but measurements of a run that would be refused again.

    Attributes:
        staging: the staging folder.
        contents: the folder inside it that becomes `out`; other files may be put there.
        scratch: a folder inside it for what only a resumed run needs (statistics, checkpoints on the way).
    """

    def __init__(
        self,
        out: Path,
        *,
        plan: Mapping[str, Any],
        expected_bytes: int,
        overwrite: bool = False,
        resume: bool = False,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        """Checks the output, takes its lock, and finds what an interrupted run with the same `plan` left (`resume`).

        Args:
            plan: JSON-able settings that determine every byte of every unit, input fingerprint included.
            expected_bytes: size of all tensors to be written, for the check of free space.
            max_shard_bytes: units are joined into files of at most this size; a larger unit is a file of its own.

        Raises:
            UserError: see `check_output`; another run is writing `out`; `resume` with another plan; finished work of an
                interrupted run, and neither `resume` nor `overwrite`.
            CheckpointError: not enough space; damaged journal; the file system refuses.
        """
        check_output(out, overwrite, resume, expected_bytes, max_shard_bytes)
        self._out = Path(out)
        self._overwrite = overwrite
        self._max_shard_bytes = max_shard_bytes
        self._written: set[str] = set()
        self._published = False
        try:
            self._staging = Staging(out)
            self._staging.begin(plan, resume, overwrite)
        except OSError as error:
            raise _disk_error(error, out, resumable=resume) from error
        self.staging = self._staging.path
        self.contents = self._staging.contents
        self.scratch = self._staging.scratch
        try:
            # Taking the lock may have brought back an output that an earlier run was about to replace.
            check_replaceable(out, overwrite, resume)
        except BaseException:
            self._leave()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(keep_scratch=not isinstance(error, _REFUSALS))

    def carry_sidecars(self, source: Checkpoint) -> None:
        """Copies `source.sidecar_files()` byte for byte; a file written here with `write_json` or `write_text` wins."""
        with self._disk_errors():
            for name in source.sidecar_files():
                if name.as_posix() not in self._written:
                    target = self.contents / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source.path / name, target)
                    shutil.copymode(source.path / name, target)

    def write_json(self, name: str, value: Any) -> None:
        """Writes `value` as indented JSON, keys in the order given. Raises CheckpointError (disk full or failing)."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes `text` as UTF-8. Raises ValueError for a `name` outside the output, CheckpointError (disk)."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"'{name}' is not a file inside the output")
        with self._disk_errors():
            (self.contents / path).parent.mkdir(parents=True, exist_ok=True)
            write_durably(self.contents / path, text.encode())
            self._written.add(path.as_posix())

    def adopt(self, name: str) -> None:
        """Moves `scratch/name`, a finished folder, into the output. Raises CheckpointError (disk full or failing)."""
        with self._disk_errors():
            (self.scratch / name).rename(self.contents / name)

    def commit(self) -> Path:
        """Makes everything durable and renames the staging contents to `out`; returns `out`.

        Raises:
            CheckpointError: disk full or failing.
        """
        with self._disk_errors():
            self._staging.publish(self._overwrite)
            self._published = True
            self._staging.discard()
        return self._out

    def _leave(self, *, keep_scratch: bool = True) -> None:
        # Once published, the folder may be another run's already.
        if self._published or self._staging.finished or (keep_scratch and any(self.scratch.iterdir())):
            self._staging.release()
        else:
            self._staging.discard()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _disk_error(error, self._out, resumable=self._holds_work()) from error

    def _holds_work(self) -> bool:
        return bool(self._staging.finished) or (self.scratch.is_dir() and any(self.scratch.iterdir()))


class CheckpointWriter(OutputWriter):
    """Collects units (a layer's tensors, or the rest) of a checkpoint.

    with CheckpointWriter(out, plan=plan, expected_bytes=size, resume=True) as writer:
        for unit in units:
            if unit not in writer.finished:
                writer.write_unit(unit, tensors_of(unit))
        writer.carry_sidecars(source)
        writer.write_json("config.json", config)
        writer.commit()
    """

    @property
    def finished(self) -> frozenset[str]:
        """Units that are safely on disk: those of the interrupted run, and those written since."""
        return self._staging.finished

    def payload(self, unit: str) -> dict[str, Any]:
        """The JSON that was stored with a finished unit."""
        record = self._staging.units.get(unit)
        if record is None:
            raise KeyError(unit)
        return record.payload

    def write_unit(self, unit: str, tensors: Mapping[str, Tensor], payload: Mapping[str, Any] | None = None) -> None:
        """Writes the tensors of one unit durably; on return the unit is finished.

        Args:
            payload: JSON-able facts that a resumed run needs (decision, digests); see `payload`.

        Raises:
            ValueError: the unit is already finished, or another unit has a tensor of the same name.
            CheckpointError: disk full or failing.
        """
        if unit in self.finished:
            raise ValueError(f"unit '{unit}' is already written")
        if self._staging.shards and unit not in self._staging.units:
            raise ValueError(f"unit '{unit}' comes after the shards were assembled")
        for other, names in self._staging.tensor_names.items():
            twice = names & tensors.keys()
            if twice:
                raise ValueError(f"tensor '{min(twice)}' of unit '{unit}' was already written by unit '{other}'")
        facts = json.loads(json.dumps(dict(payload or {})))
        with self._disk_errors():
            file = self._staging.next_unit_file()
            file_bytes, header_digest, digest = shards.write_tensors(file, tensors)
            record = UnitRecord(unit, file.name, file_bytes, header_digest, digest, facts)
            self._staging.record_unit(record, frozenset(tensors))

    def assemble(self) -> Path:
        """Joins the units into the final shards and returns `contents`, a complete checkpoint ready to be verified.

        No unit can be written afterwards. Needs room for one shard beside the units; an interruption can be resumed.

        Raises:
            ValueError: nothing was written, or a unit of the interrupted run was damaged and not written again.
            CheckpointError: disk full or failing.
        """
        units = self._staging.units
        lost = [unit for unit, record in units.items() if record is None]
        if lost or not units:
            raise ValueError(f"unit '{lost[0]}' must be written again" if lost else "no unit was written")
        with self._disk_errors():
            if not self._staging.shards:
                self._staging.record_shards(self._plan_shards())
            for shard in self._staging.shards:
                if not self._staging.shard_done(shard):
                    self._build(shard)
                for unit in shard.units:
                    self._staging.unit_file(unit).unlink(missing_ok=True)
            self._write_index()
        return self.contents

    def commit(self) -> Path:
        """Assembles (unless done), makes everything durable, and renames the staging contents to `out`; returns `out`.

        Raises:
            ValueError, CheckpointError: see `assemble`.
        """
        self.assemble()
        return super().commit()

    def forget(self, units: Iterable[str]) -> None:
        """These units will be made again. Raises CheckpointError (disk full or failing)."""
        with self._disk_errors():
            self._staging.forget(units)

    def staged(self, config: dict[str, Any]) -> Checkpoint:
        """The finished units as a checkpoint to read from, complete or not; valid until the next one is written."""
        staging = self._staging
        done = [shard for shard in staging.shards if staging.shard_done(shard)]
        joined = {unit for shard in done for unit in shard.units}
        files = [self.contents / shard.file for shard in done]
        files += [staging.unit_file(unit) for unit in sorted(self.finished - joined)]
        headers = {os.path.relpath(file, self.contents): read_header(file) for file in files}
        tensors = {info.name: info for header in headers.values() for info in header.tensors}
        ordered = {name: tensors[name] for name in sorted(tensors, key=natural_key)}
        return Checkpoint(self.contents, config, ordered, headers, partial=True)

    def _plan_shards(self) -> tuple[ShardRecord, ...]:
        headers = {unit: read_header(self._staging.unit_file(unit)) for unit in self._staging.units}
        sizes = {unit: sum(info.nbytes for info in header.tensors) for unit, header in headers.items()}
        groups = shards.group_units(sizes, self._max_shard_bytes)
        records = []
        for name, group in zip(shards.shard_names(len(groups)), groups, strict=True):
            size, digest = shards.joined_size([headers[unit] for unit in group])
            records.append(ShardRecord(name, tuple(group), size, digest))
        return tuple(records)

    def _build(self, shard: ShardRecord) -> None:
        parts: list[Header] = [read_header(self._staging.unit_file(unit)) for unit in shard.units]
        if shards.joined_size(parts) != (shard.file_bytes, shard.header_digest):
            message = f"{self.staging}: the units of '{shard.file}' changed while the run was interrupted"
            raise CheckpointError(message, hint="start afresh with `overwrite` instead of `resume`")
        first = self._staging.units[shard.units[0]]
        assert first is not None
        joined, digest = self._staging.unit_file(shard.units[0]), first.digest
        if len(parts) > 1:
            joined = self.staging / "units" / "joining"
            digest = shards.join(parts, joined)
        # Journaled first: of a shard that is one unit's own file nothing else would be left to know it by.
        self._staging.record_joined(shard, digest)
        joined.rename(self.contents / shard.file)
        sync_folder(self.contents)

    def _write_index(self) -> None:
        if len(self._staging.shards) == 1:
            return
        weight_map, total = {}, 0
        for shard in self._staging.shards:
            for info in read_header(self.contents / shard.file).tensors:
                weight_map[info.name] = shard.file
                total += info.nbytes
        self.write_json(INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _disk_error(error: OSError, out: Path, *, resumable: bool) -> CheckpointError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "disk full" if full else (error.strerror or str(error))
    where = f" ({error.filename})" if error.filename else ""
    remedy = "free some space" if full else "check the disk"
    how = "run again with `resume`: finished layers are kept" if resumable else "run again"
    return CheckpointError(f"writing '{out}' failed: {reason}{where}", hint=f"{remedy} and {how}")
