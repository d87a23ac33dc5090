"""Options of verbs, written once.

A field of an option class made by `option` is a keyword argument of the Python API and an option of the command line;
its help text is the documentation of both. Modules with option classes import no torch, so that `--help` is fast.

Messages of errors and help texts name arguments in backticks, `name` or `name=value`; the command line shows them as
options.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import MISSING, Field, field, fields
from functools import cache
from operator import index
from os import PathLike, fspath
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moetools.errors import UserError

DATA, RUNNING, RECIPE, STATISTICS = "Data", "Running", "Recipe", "Statistics"
TRAINING, PLACEMENT, OUTPUT, DISPLAY = "Training", "Placement", "Output", "Display"

LARGEST = 2**50
"""Of numbers that are given: products of two or three of them still fit into 64 bits or are floats."""
_KEY = "moetools"


def option(
    default: Any,
    help: str,  # noqa: A002 - what everybody calls it
    *,
    metavar: str | None = None,
    flags: str | None = None,
    panel: str | None = None,
    choices: Callable[[], Sequence[str]] | None = None,
    path: Literal["reads", "writes"] | None = None,
) -> Any:
    """A field of an option class.

    Args:
        default: also the type's: a list or dict is made anew for every instance.
        help: one or two sentences.
        metavar: what stands for the value in `--help`.
        flags: other names on the command line than `--field-name`, as Typer takes them.
        panel: heading it stands under in `--help`.
        choices: legal names, also for shell completion.
        path: whether the value is a path that the run reads, or writes.
    """
    about = {"help": help, "metavar": metavar, "flags": flags, "panel": panel, "choices": choices, "path": path}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={_KEY: about})
    return field(default=default, metadata={_KEY: about})


def about(option_field: "Field[Any]") -> dict[str, Any] | None:
    """What `option` was told of a field; None for a plain one."""
    return option_field.metadata.get(_KEY)


def default(option_field: "Field[Any]") -> Any:
    """What a field is if it is not given."""
    made = option_field.default_factory
    return option_field.default if made is MISSING else made()


@cache
def types(owner: type) -> dict[str, Any]:
    """The type of every field of an option class."""
    return get_type_hints(owner)


def kinds(hint: Any) -> tuple[Any, ...]:
    """The types that may stand in for `hint`: those of a union one by one, without the None."""
    parts = get_args(hint) if get_origin(hint) not in (list, Literal) else ()
    return tuple(part for part in parts or (hint,) if part is not NoneType)


def read(name: str, value: Any, hint: Any) -> Any:
    """`value` as a field of type `hint` holds it.

    Text becomes a path and a path text, a whole number a fraction; one text, or a mapping of names to paths, becomes a
    list; whatever holds whole numbers becomes a list of them, or lists by number.

    Raises:
        UserError: a value of another type, or a number beyond `LARGEST`.
    """
    legal = kinds(hint)
    if value is None and NoneType in get_args(hint):
        return None
    if list[str] in legal and (texts := _texts(value)) is not None:
        return texts
    if Path in legal and isinstance(value, str | PathLike):
        return Path(value)
    if isinstance(value, str) and any(kind is str or get_origin(kind) is Literal for kind in legal):
        return value
    if isinstance(value, PathLike) and str in legal:
        return str(fspath(value))
    if list[int] in legal and (numbers := _numbers(value)) is not None:
        return numbers
    if dict[int, list[int]] in legal and (by_number := _numbers_by_number(value)) is not None:
        return by_number
    if type(value) is int and abs(value) > LARGEST:
        raise UserError(f"`{name}` is a number of {len(str(abs(value)))} digits; legal: up to {LARGEST:,}")
    for kind in (bool, int, float):
        if kind in legal and (type(value) is kind or (kind is float and type(value) is int)):
            return kind(value)
    raise UserError(f"`{name}={value!r}` is of type {type(value).__name__}; legal: {described(hint)}")


def described(hint: Any) -> str:
    """A type in words: int, None."""
    parts = [*kinds(hint), *((None,) if NoneType in get_args(hint) else ())]
    names: dict[Any, str] = {list[str]: "str, list or dict of str", Path: "path", None: "None"}
    names |= {list[int]: "list of int", dict[int, list[int]]: "dict of lists of int"}
    return ", ".join(names.get(part) or _name(part) for part in parts)


def _name(kind: Any) -> str:
    return ", ".join(map(repr, get_args(kind))) if get_origin(kind) is Literal else kind.__name__


def _texts(value: Any) -> list[str] | None:
    if isinstance(value, str | PathLike):
        return [str(fspath(value))]
    if not isinstance(value, Iterable):
        return None
    items = list(value.values() if isinstance(value, Mapping) else value)
    if not all(isinstance(item, str | PathLike) for item in items):
        return None
    paths = [str(fspath(item)) for item in items]
    return [f"{name}={path}" for name, path in zip(value, paths, strict=True)] if isinstance(value, Mapping) else paths


def paths(options: Any, use: Literal["reads", "writes"]) -> Iterator[tuple[str, Path]]:
    """(argument in backticks, path) of the paths that an instance of an option class names."""
    for one in fields(options):
        known, value = about(one), getattr(options, one.name)
        if known is not None and known["path"] == use and value is not None:
            yield f"`{one.name}`", Path(value)


def _numbers(value: Any) -> list[int] | None:
    """Whole numbers of any library's types, in their order; those of a set, which has none, sorted."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        return None
    items = list(value)
    try:
        found = [index(item) for item in items]
    except TypeError:
        return None
    if any(isinstance(item, bool) for item in items):
        return None
    return sorted(found) if isinstance(value, Set) else found


def _numbers_by_number(value: Any) -> dict[int, list[int]] | None:
    if not isinstance(value, Mapping):
        return None
    found = {}
    for key, item in value.items():
        number = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        numbers = _numbers(item)
        if type(number) is not int or numbers is None:
            return None
        found[number] = numbers
    return found
