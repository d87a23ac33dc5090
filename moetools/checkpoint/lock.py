"""Exclusive use of a folder: a file in it that is locked (flock) while a run writes there."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from moetools.checkpoint.durable import sync_folder
from moetools.errors import UserError


def lock_folder(folder: Path, name: str, out: Path) -> IO[bytes]:
    """Make `folder` if it is missing and take the lock; closing the stream gives it back, and so does dying.

    The file may be deleted by who holds it, also together with the folder: who waits to lock it takes a new one.

    Args:
        name: of the file.
        out: what the run writes, for the message.

    Raises:
        UserError: another run holds it.
        OSError: from the file system; a folder that was made for nothing is removed.
    """
    lock = None
    while lock is None:
        made = not folder.exists()
        try:
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
            lock = _locked(folder / name, out)
        except OSError:
            if made:
                # Another run may have taken it meanwhile.
                with suppress(OSError):
                    folder.rmdir()
            raise
    return lock


def _locked(file: Path, out: Path) -> IO[bytes] | None:
    """The lock; None if the file that was locked is not the one in the folder any more."""
    lock = file.open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The run that held it may have removed the file between our opening and our locking it.
        if file.exists() and file.stat().st_ino == os.fstat(lock.fileno()).st_ino:
            return lock
    except BlockingIOError as error:
        lock.close()
        message = f"another moetools run is writing '{out}' (lock: {file})"
        raise UserError(message, hint="wait for it, stop it, or choose another output") from error
    except BaseException:
        lock.close()
        raise
    lock.close()
    return None
