"""The folder beside the output in which `compress` measures and builds.

.NAME.moetools-compress/
    lock           held while a run works there
    probes.json    what was measured
    little/ more/ text/  the text that commands are given
    probes/        single choices, each thrown away when it is measured
    plans/         the plans that are built; the best becomes the output
    publish        inode of the folder that is about to become the output
    replaced/      the overwritten output, for an instant, where folders cannot be exchanged
"""

import logging
import shutil
from contextlib import suppress
from pathlib import Path

from moetools.checkpoint.durable import replace_folder, sync_folder, write_durably
from moetools.checkpoint.lock import lock_folder
from moetools.checkpoint.output import check_replaceable, real
from moetools.errors import CheckpointError, UserError

_LOG = logging.getLogger(__name__)
_LOCK, _PROBES, _PUBLISH, _REPLACED = "lock", "probes.json", "publish", "replaced"
_FILES = (_LOCK, _PROBES, _PUBLISH, f"{_PROBES}.new", f"{_PUBLISH}.new")
_FOLDERS = ("little", "more", "text", "probes", "plans", _REPLACED)


class Workspace:
    """Exclusive use of the folder of one output, from `open` to `close`.

    Attributes:
        path: the folder.
    """

    def __init__(self, out: Path) -> None:
        self._out = real(out)
        self.path = self._out.with_name(f".{self._out.name}.moetools-compress")
        self.little, self.more, self.text, self.probes, self.plans = (self.path / name for name in _FOLDERS[:5])
        self.measured = self.path / _PROBES

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Remove what a run left that died behind its last step; anything else stays as it is.

        Raises:
            UserError: another run works there, or one was interrupted and neither `resume` nor `overwrite` says what to
                do with what it measured.
            CheckpointError: the folder is not ours.
        """
        if not self.path.exists() and not self.path.is_symlink():
            return
        self._check_ours()
        self._lock = lock_folder(self.path, _LOCK, self._out)
        if self._published():
            self._remove()
            return
        self._lock.close()
        if not (resume or overwrite) and any(entry.name != _LOCK for entry in self.path.iterdir()):
            raise UserError(
                f"an interrupted run left its measurements in '{self.path}'",
                hint="`resume` goes on from there, `overwrite` throws them away",
            )

    def open(self, *, resume: bool) -> None:
        """Take the lock; without `resume`, empty the folder.

        Raises:
            UserError: another run works there.
            OSError: from the file system.
        """
        self._lock = lock_folder(self.path, _LOCK, self._out)
        try:
            if (self.path / _REPLACED).exists() and not self._out.exists():
                (self.path / _REPLACED).rename(self._out)
            if not resume:
                self._empty()
        except BaseException:
            self._lock.close()
            raise

    def publish(self, folder: Path, *, overwrite: bool) -> None:
        """Put a folder in the place of the output in one step.

        Raises:
            UserError: another run has made the output meanwhile, and it may not be overwritten.
        """
        check_replaceable(self._out, overwrite, resume=False)
        write_durably(self.path / _PUBLISH, str(folder.stat().st_ino).encode())
        if self._out.exists():
            replace_folder(folder, self._out, self.path / _REPLACED)
        else:
            folder.rename(self._out)
        sync_folder(self._out.parent)

    def close(self, *, keep: bool) -> None:
        """Give the lock back; with `keep`, what was measured stays for a run that goes on."""
        if keep and self.measured.exists() and not self._published():
            _LOG.warning("what was measured is kept in '%s': run it again with `resume`", self.path)
            self._lock.close()
        else:
            self._remove()

    def _check_ours(self) -> None:
        known = self.path.is_dir() and not self.path.is_symlink()
        wrong = [entry.name for entry in self.path.iterdir() if not _is_ours(entry)] if known else [self.path.name]
        if wrong:
            raise CheckpointError(
                f"'{self.path}' is not what a run leaves: '{wrong[0]}'", hint="move it out of the way"
            )

    def _published(self) -> bool:
        file = self.path / _PUBLISH
        return file.exists() and self._out.exists() and file.read_bytes() == str(self._out.stat().st_ino).encode()

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()

    def _remove(self) -> None:
        try:
            self._empty()
            (self.path / _LOCK).unlink(missing_ok=True)
        except OSError as error:
            _LOG.warning("'%s' cannot be removed: %s", self.path, error.strerror)
        self._lock.close()
        # Not empty when another run has just taken the folder over.
        with suppress(OSError):
            self.path.rmdir()


def _is_ours(entry: Path) -> bool:
    if entry.is_symlink():
        return False
    return entry.name in (_FOLDERS if entry.is_dir() else _FILES)
