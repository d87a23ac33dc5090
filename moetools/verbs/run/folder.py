"""The folder of a run: what may be one, and exclusive use of it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moetools.checkpoint.lock import lock_folder
from moetools.checkpoint.output import real
from moetools.errors import UserError
from moetools.verbs.run.state import FILE_NAME

_LOCK = "moetools-run.lock"


def check_folder(out: Path) -> None:
    """Raises UserError unless `out` is absent, empty, or the folder of a run."""
    if out.exists() and not out.is_dir():
        raise UserError(f"`out`: '{out}' is a file; the outputs of a run lie in a folder")
    if not real(out).parent.is_dir():
        raise UserError(f"`out`: the folder '{real(out).parent}' does not exist", hint="make it first")
    if not out.is_dir() or (out / FILE_NAME).is_file():
        return
    if any(entry.name not in (_LOCK, f"{FILE_NAME}.new") for entry in out.iterdir()):
        raise UserError(f"`out`: '{out}' holds other things than a run", hint="choose a new folder")


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """Exclusive use of the folder, which is made; it is removed again if nothing was put into it.

    Raises:
        UserError: it is no folder of a run, or another run works there.
    """
    check_folder(out)
    lock = lock_folder(real(out), _LOCK, out)
    try:
        yield
    finally:
        with suppress(OSError):
            (real(out) / _LOCK).unlink(missing_ok=True)
        lock.close()
        # Not empty, mostly.
        with suppress(OSError):
            real(out).rmdir()
