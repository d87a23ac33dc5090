"""The only place that prints: results to stdout, everything else to stderr, and every way a command can end."""

import contextlib
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import typer

from moetools.errors import MoetoolsError
from moetools.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

    from moetools.forward.progress import Progress
    from moetools.pipeline.table import Table

BAD_USAGE, INTERRUPTED, BROKEN_PIPE, TERMINATED = 2, 130, 141, 143
_CHUNK = 8192
_GAP = 3
"""Blanks between two columns of a table."""
_NUMBER = re.compile(r"[-+~<>]?\s*\d[\d,.]*(e[-+]?\d+)?\s*[A-Za-z%/]*")
_NO_VALUE = ("", "-", "n/a")
_RETRY_SECONDS = 0.01
"""Until a signal that was dropped is sent again."""


class Terminated(BaseException):
    """SIGTERM arrived; raised in the main thread so that context managers clean up."""


class Result(Protocol):
    """What every verb returns."""

    def tables(self) -> Sequence["Table"]: ...

    def to_json(self) -> Mapping[str, Any]: ...


class Session:
    """One run of a command: shows its progress and result, and turns every exception into lines and an exit code.

    Use it as a context manager around all that a command does, imports of the verb included.

    Args:
        as_json: the result is one JSON object.
        quiet: no progress and no log lines.
        debug: tracebacks, warnings and debug log lines.
        resume: how an interrupted run goes on, in a few words; empty if it cannot.
        wording: messages as the command line says them, with options for arguments.
    """

    def __init__(
        self,
        *,
        as_json: bool,
        quiet: bool,
        debug: bool,
        resume: str = "",
        wording: Callable[[str], str] = str,
    ) -> None:
        self._json, self._quiet, self._debug, self._resume = as_json, quiet, debug, resume
        self._wording = wording
        self._cleanup = contextlib.ExitStack()
        self._stderr: Console | None = None

    def __enter__(self) -> "Session":
        if not self._debug:
            _hush_libraries()
            self._cleanup.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        self._cleanup.enter_context(_LogLines(self))
        self._cleanup.enter_context(_sigterm_as_exception())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()
        if error is None or isinstance(error, (SystemExit, typer.Exit)):
            return
        if isinstance(error, BrokenPipeError):
            _abandon_stdout()
            raise typer.Exit(BROKEN_PIPE)
        if self._debug:
            sys.stderr.write("".join(traceback.format_exception(error)))
        message, hint, code = describe(error, resume=self._resume)
        print_error(self._wording(message), hint=self._wording(hint))
        raise typer.Exit(code) from None

    @property
    def stderr(self) -> "Console":
        if self._stderr is None:
            from rich.console import Console

            self._stderr = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        return self._stderr

    @property
    def progress(self) -> "Progress":
        """Draws a bar on a terminal, writes a line per pass elsewhere, and shows nothing when quiet."""
        from moetools.cli.progress import progress_on
        from moetools.forward.progress import Silent

        shown: Progress = Silent() if self._quiet else progress_on(self.stderr)
        self._cleanup.callback(shown.stop)
        return shown

    def log(self, line: str) -> None:
        """One line on stderr, above a progress bar if there is one."""
        self.stderr.print(printable(line, lines=True))

    def result(self, result: Result) -> None:
        """Print a verb's result to stdout."""
        tables = [] if self._json else [self._worded(table) for table in result.tables()]
        text = to_json_text(result.to_json()) if self._json else render_tables(tables)
        # An unbuffered stdout (PYTHONUNBUFFERED) forgets the rest of a write that a closing pipe cuts short.
        for start in range(0, len(text), _CHUNK):
            sys.stdout.write(text[start : start + _CHUNK])
        sys.stdout.flush()

    def _worded(self, table: "Table") -> "Table":
        said = self._wording
        rows = [[said(cell) for cell in row] for row in table.rows]
        return replace(table, title=said(table.title), rows=rows, note=said(table.note))

    @property
    def log_level(self) -> int:
        return logging.DEBUG if self._debug else logging.ERROR if self._quiet else logging.INFO


def describe(error: BaseException, *, resume: str = "") -> tuple[str, str, int]:
    """(message, hint, exit code) of whatever ended a command."""
    if isinstance(error, MoetoolsError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", resume, INTERRUPTED
    if isinstance(error, Terminated):
        return "terminated by SIGTERM", resume, TERMINATED
    if _is_disk_full(error):
        place = f": '{error.filename}'" if isinstance(error, OSError) and error.filename else ""
        return f"no space left on the disk{place}", f"free some space{'; then ' + resume if resume else ''}", 1
    if _is_out_of_memory(error):
        return f"out of memory: {_first_line(error)}", "lower --memory-budget or --batch-size", 1
    if isinstance(error, OSError) and error.strerror:
        # A failing disk may have let layers through before, and a limit of file sizes (ulimit -f) can be raised; no
        # other error of the system is mended by going on.
        hint = resume if error.errno in (errno.EIO, errno.EFBIG) else ""
        return f"{error.strerror}" + (f": '{error.filename}'" if error.filename else ""), hint, 1
    text = f"internal error: {type(error).__name__}: {_first_line(error)} (run again with --debug for the traceback)"
    return text, "", 1


def print_error(message: str, *, hint: str = "") -> None:
    """`error: ...` and, if there is something to say, `hint: ...` on stderr."""
    red, bold, plain = ("\x1b[31m", "\x1b[1m", "\x1b[0m") if _colours(sys.stderr) else ("", "", "")
    head = "" if message.startswith("internal error:") else f"{bold}{red}error:{plain} "
    said = f"{head}{printable(message)}\n" + (f"{bold}hint:{plain} {printable(hint)}\n" if hint else "")
    sys.stderr.write(said)


def print_line(text: str) -> None:
    """One line, or a whole page, on stdout."""
    sys.stdout.write(f"{text}\n")


def render_tables(tables: Sequence["Table"]) -> str:
    """Tables as text: fitted to the terminal, or as wide as they are where stdout is none."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    page = io.StringIO()
    width = shutil.get_terminal_size().columns if terminal else 100_000
    colours = _colours(sys.stdout)
    console = Console(file=page, width=width, force_terminal=colours, highlight=False, markup=False, emoji=False)
    for number, table in enumerate(tables):
        if number:
            console.print()
        _render(console, _shown(table))
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()) + "\n"


def to_json_text(value: Mapping[str, Any]) -> str:
    """Strict JSON, indented: numbers that are not finite become null, paths become text."""
    return printable(json.dumps(_strict(value), indent=2, ensure_ascii=False, allow_nan=False), lines=True) + "\n"


def _shown(table: "Table") -> "Table":
    """The same with text that a terminal can show."""
    rows = [[printable(cell) for cell in row] for row in table.rows]
    columns = [printable(heading) for heading in table.columns]
    return replace(table, title=printable(table.title), columns=columns, rows=rows, note=printable(table.note))


def _render(console: "Console", table: "Table") -> None:
    from rich import box
    from rich.table import Table as RichTable

    if table.title:
        console.print(table.title, style="bold")
    columns, rows = _fitted(table, console.width)
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for place, heading in enumerate(columns):
        cells = [row[place] for row in rows]
        drawn.add_column(heading, justify="right" if is_numeric(cells) else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    console.print(drawn)
    if table.note:
        console.print(table.note, style="dim")


def _fitted(table: "Table", width: int) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Columns and rows; on its side if the table is too wide as it is and fits that way."""
    upright = [list(table.columns), *(list(row) for row in table.rows)]
    on_its_side = [list(line) for line in zip(*upright, strict=True)]
    # A column is a line of the table on its side.
    lines = upright if _width(on_its_side) <= width or _width(upright) > width else on_its_side
    return lines[0], lines[1:]


def _width(columns: Sequence[Sequence[str]]) -> int:
    """How wide a table is whose cells are not folded."""
    return sum(max(map(len, cells)) for cells in columns) + _GAP * (len(columns) - 1)


def is_numeric(cells: Sequence[str]) -> bool:
    """Whether all cells that say something are numbers, with or without a unit."""
    said = [cell.strip() for cell in cells if cell.strip() not in _NO_VALUE]
    return bool(said) and all(_NUMBER.fullmatch(cell) for cell in said)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and tokenizers report the system's error number only as text.
    return f"(os error {errno.ENOSPC})" in str(error)


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def _colours(stream: Any) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _hush_libraries() -> None:
    # They read these once, when they are imported, which a command does after its session begins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _abandon_stdout() -> None:
    # Python flushes stdout again at exit and would complain about the closed pipe once more.
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    def terminate(signum: int, frame: Any) -> None:  # noqa: ARG001
        raise Terminated

    def once_more(unraisable: Any) -> None:
        # Python drops what a signal raises inside a finalizer, and with it the signal: it is sent again.
        again = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}.get(unraisable.exc_type)
        if again is None:
            shown(unraisable)
        else:
            threading.Timer(_RETRY_SECONDS, os.kill, (os.getpid(), again)).start()

    shown = sys.unraisablehook
    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:
        # Only the main thread may handle signals; elsewhere the caller's handling stays.
        yield
        return
    sys.unraisablehook = once_more
    try:
        yield
    finally:
        sys.unraisablehook = shown
        signal.signal(signal.SIGTERM, before)


class _LogLines(logging.Handler):
    """Shows the log of moetools as lines of a session."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.log_level)
        self._session = session
        self._logger = logging.getLogger("moetools")
        self._warned: set[str] = set()
        self._level_before = self._logger.level

    def emit(self, record: logging.LogRecord) -> None:
        # A model that is opened twice has the same to say twice.
        if record.levelno == logging.WARNING and record.getMessage() in self._warned:
            return
        self._warned.add(record.getMessage())
        prefix = f"{record.levelname.lower()}: " if record.levelno != logging.INFO else ""
        self._session.log(prefix + self._session._wording(record.getMessage()))

    def __enter__(self) -> "_LogLines":
        self._logger.addHandler(self)
        self._logger.setLevel(self.level)
        return self

    def __exit__(self, *error: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level_before)
