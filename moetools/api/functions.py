"""Functions of `moetools`, made from the catalogue of verbs: an option is written once, in the verb's option class."""

import difflib
import functools
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field
from os import PathLike
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from moetools.arguments import about, default, kinds, types
from moetools.verbs.catalogue import VERBS, Place, Verb

if TYPE_CHECKING:
    from moetools.forward.progress import Progress

Pathlike = str | PathLike[str]
Pathlikes = Sequence[Pathlike]
Strings = str | Sequence[str]
Texts = Pathlike | Pathlikes | Mapping[str, Pathlike]
"""Paths, with names before them (`NAME=PATH`) or as the keys of a mapping."""
_TEXTS = "A path, several, or a mapping of names to paths."
PROGRESS = "Show a progress bar on stderr."
RAISES = "MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind."
_WIDTH = 116
_NAMED = "NAME=PATH"
_LISTED = "LIST"
"""Text, or the file that holds it."""


def make_function(verb: Verb) -> Callable[..., Any]:
    """The function that does what `verb` does on the command line, and returns its report."""

    def function(*given: Any, **options: Any) -> Any:
        _check_names(verb, options)
        try:
            values = dict(inspect.signature(function).bind(*given, **options).arguments)
        except TypeError as error:
            raise TypeError(f"{verb.python_name}(): {error}") from None
        shown = values.pop("progress", False)
        command = verb.written_call(values)
        places = [values.pop(place.name) for place in verb.places]
        with _progress(shown) as progress:
            return verb.call(places, values, command=command, progress=progress)

    function.__name__ = function.__qualname__ = verb.python_name
    function.__module__ = "moetools"
    function.__doc__ = docstring(verb)
    function.__signature__ = signature(verb)  # type: ignore[attr-defined]
    return function


def signature(verb: Verb) -> inspect.Signature:
    """Places, then every option by keyword."""
    parameters = [
        inspect.Parameter(place.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=_union(place_types(place)))
        for place in verb.places
    ]
    for owner, one in verb.arguments():
        parameters.append(_keyword(one.name, default(one), _union(option_types(owner, one))))
    if verb.options:
        parameters.append(_keyword("progress", False, bool))
    return inspect.Signature(parameters, return_annotation=verb.returns.rpartition(".")[2])


def place_types(place: Place) -> list[Any]:
    """What may be given for a place."""
    return [Pathlike, Pathlikes] if place.several else [Pathlike]


def option_types(owner: type, one: "Field[Any]") -> list[Any]:
    """What may be given for an option: more than its field holds, see `moetools.arguments.read`."""
    hint, known = types(owner)[one.name], about(one)
    assert known is not None
    accepted = [_accepted(kind, known["metavar"]) for kind in kinds(hint)]
    return accepted + ([None] if NoneType in get_args(hint) else [])


def docstring(verb: Verb) -> str:
    """Summary, arguments with their help texts, what is returned and raised."""
    entries = [f"{name}: {text}" for name, text in explained(verb)]
    sections = [
        "\n".join(textwrap.wrap(verb.summary, _WIDTH)),
        "\n".join(textwrap.wrap(verb.details, _WIDTH)),
        "Args:\n" + "\n".join(map(_entry, entries)),
        "Raises:\n" + _entry(RAISES),
    ]
    return "\n\n".join(filter(None, sections))


def explained(verb: Verb) -> Iterator[tuple[str, str]]:
    """(argument, help text) in the order of the signature."""
    yield from ((place.name, place.help) for place in verb.places)
    for _, one in verb.arguments():
        known = about(one)
        assert known is not None
        yield one.name, f"{known['help']} {_TEXTS}" if known["metavar"] == _NAMED else known["help"]
    if verb.options:
        yield "progress", PROGRESS


def _entry(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="    ", subsequent_indent="        ")


def _keyword(name: str, value: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)


def _accepted(kind: Any, metavar: str | None) -> Any:
    if kind == list[str]:
        return Texts if metavar == _NAMED else Strings
    path = isinstance(kind, type) and issubclass(kind, PathLike)
    return Pathlike if path or (kind is str and metavar == _LISTED) else kind


def _union(parts: Sequence[Any]) -> Any:
    return functools.reduce(operator.or_, parts)


def _check_names(verb: Verb, options: Mapping[str, Any]) -> None:
    legal = list(signature(verb).parameters)
    for name in options:
        if name not in legal:
            close = difflib.get_close_matches(name, legal, n=1, cutoff=0.5)
            meant = f"; did you mean '{close[0]}'?" if close else ""
            raise TypeError(f"{verb.python_name}() got an unexpected keyword argument '{name}'{meant}")


@contextmanager
def _progress(wanted: bool) -> "Iterator[Progress | None]":
    if not wanted:
        yield None
        return
    from rich.console import Console

    from moetools.cli.progress import progress_on

    shown = progress_on(Console(stderr=True))
    try:
        yield shown
    finally:
        shown.stop()


FUNCTIONS = {verb.python_name: make_function(verb) for verb in VERBS}
