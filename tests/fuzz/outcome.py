"""Runs one hostile input and says how it ended: accepted, refused, or in a way that is a defect of ours."""

import contextlib
import io
import re
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from moetools.cli.app import run
from moetools.errors import MoetoolsError

Ending = Literal["accepted", "refused", "internal", "hang", "memory", "escapes"]
DEFECTS: tuple[Ending, ...] = ("internal", "hang", "memory", "escapes")
_ESCAPES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class _TooLong(BaseException):
    pass


def outcome(action: Sequence[str] | Callable[[], object], *, seconds: int = 20) -> tuple[Ending, str]:
    """How an action ends, and its last words.

    An exit code of 0 is accepted, an error line is refused; "internal error", another exception or a character that a
    terminal obeys is a defect, and so is taking longer than `seconds`.
    """
    out, err = io.StringIO(), io.StringIO()
    try:
        with _alarm(seconds), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = _call(action) if callable(action) else run(action)
    except _TooLong:
        return "hang", f"over {seconds} s"
    except MoetoolsError as error:
        return "refused", error.message
    except MemoryError:
        return "memory", "MemoryError"
    except Exception:  # noqa: BLE001 - whatever it is, it is what we look for
        return "internal", traceback.format_exc()
    said = err.getvalue()
    if "internal error" in said or "Traceback" in said:
        return "internal", said
    if "out of memory" in said:
        return "memory", said
    if _ESCAPES.search(out.getvalue()) or _ESCAPES.search(said):
        return "escapes", ascii(said)
    return ("refused" if code else "accepted"), said


def _call(action: Callable[[], object]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        action()
    return 0


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
