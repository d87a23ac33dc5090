"""Where code that is not ours is called: whatever it raises becomes one line with its cause."""

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

from moetools.errors import DataError, MoetoolsError, UserError

_T = TypeVar("_T")
_END = object()
# What a panic in Rust code (tokenizers) becomes: not an Exception, and importable from nowhere.
_PANIC = "PanicException"


@contextmanager
def foreign(what: str, hint: str, kind: type[MoetoolsError] = DataError) -> Iterator[None]:
    """Run foreign code; `what` says in the error what did not work.

    Raises:
        DataError: or another `kind`, "`what`: cause", for anything that was raised inside, our own errors excepted.
    """
    try:
        yield
    except MoetoolsError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or type(error).__name__ == _PANIC):
            raise
        raise kind(f"{what}: {cause(error)}", hint=hint) from error


def drawn(items: Iterable[_T], what: str, hint: str) -> Iterator[_T]:
    """The items of a foreign iterable, each drawn under `foreign`; what the caller does with them is not."""
    with foreign(what, hint):
        iterator = iter(items)
    while True:
        with foreign(what, hint):
            item = next(iterator, _END)
        if item is _END:
            return
        yield item  # type: ignore[misc]


def cause(error: BaseException) -> str:
    """The error as one line: the system's words, or the type and the first line that says something."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def optional_module(name: str, *, install: str, what: str) -> ModuleType:
    """Import a package that is not among our dependencies; `install` is what pip has to install.

    Raises:
        UserError: it is not installed; the hint is the pip command.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise UserError(f"{what} needs the package {package}", hint=f"pip install '{install}'") from error
