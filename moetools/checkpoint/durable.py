"""File-system steps that survive a crash: fsync of files and folders, and the exchange of two folders in one step."""

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_durably(file: Path, data: bytes) -> None:
    """Writes `data` under a temporary name, fsyncs, and renames: afterwards `file` has all of it, or is as it was.

    A disk that fails leaves no temporary file.
    """
    make_durably(file, lambda temporary: temporary.write_bytes(data))


def make_durably(file: Path, write: Callable[[Path], object]) -> None:
    """The same for a file that `write` makes at the place it is given."""
    temporary = file.with_name(file.name + ".new")
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.rename(file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync for folders; their renames are durable by themselves.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Makes every file below `folder`, and every name, durable."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with (Path(parent) / name).open("rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(Path(parent))


def exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one atomic step (Linux `renameat2`); False where system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def replace_folder(new: Path, out: Path, aside: Path) -> None:
    """Puts `new` in the place of the folder `out`; what was there ends up at `new` or at `aside`.

    Atomic where `exchange` works. Elsewhere there is an instant without `out`; `aside` then holds what it was.
    """
    if not exchange(new, out):
        out.rename(aside)
        try:
            new.rename(out)
        except OSError:
            aside.rename(out)
            raise
