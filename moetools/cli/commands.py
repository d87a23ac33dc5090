"""Commands, made from the catalogue of verbs: an option is written once, in the verb's option class."""

import ast
import inspect
import re
import shlex
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from types import NoneType
from typing import Annotated, Any, get_args

import typer

from moetools.arguments import DISPLAY, about, default, kinds, option, types
from moetools.cli.console import Session
from moetools.errors import GateError
from moetools.verbs.catalogue import VERBS, Place, Verb

_QUOTED = re.compile(r"`([a-z_]+)(?:=([^`]*))?`")
_CALL = re.compile(r"`(moetools\.[a-z_]+\([^`]*\))`")


@dataclass(frozen=True, kw_only=True)
class DisplayOptions:
    """What a command shows, and how."""

    json: bool = option(False, "Print the result as one JSON object.", panel=DISPLAY)
    quiet: bool = option(False, "Show neither progress nor log lines.", flags="--quiet -q", panel=DISPLAY)
    debug: bool = option(False, "Show tracebacks, warnings and debug log lines.", panel=DISPLAY)


def make_command(verb: Verb) -> Callable[..., None]:
    """The function Typer makes a command of."""

    def command(invocation: typer.Context, **values: Any) -> None:
        shown = DisplayOptions(**{one.name: values.pop(one.name) for one in fields(DisplayOptions)})
        places = [values.pop(place.name) for place in verb.places]
        resume = "" if values.get("dry_run") else verb.resume
        with Session(
            as_json=shown.json,
            quiet=shown.quiet,
            debug=shown.debug,
            resume=resume,
            wording=lambda text: as_options(text, verb),
        ) as session:
            line = shlex.join(["moetools", *(invocation.obj or ())])
            try:
                result = verb.call(places, values, command=line, progress=session.progress)
            except GateError as missed:
                session.result(missed.result)
                raise
            if result is not None:
                session.result(result)

    own = [*verb.arguments(), *((DisplayOptions, one) for one in fields(DisplayOptions))]
    options = [_option(verb, kind, one) for kind, one in own]
    parameters = [_context(), *map(_argument, verb.places), *options]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    command.__doc__ = as_options("\n\n".join(filter(None, (verb.summary, verb.details))), verb)
    return command


def _context() -> inspect.Parameter:
    return inspect.Parameter("invocation", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)


def _argument(place: Place) -> inspect.Parameter:
    shown = place.name.upper().rstrip("S") + "..." if place.several else place.name.upper()
    annotation: Any = Annotated[place.type, typer.Argument(metavar=shown, help=place.help, show_default=False)]
    return inspect.Parameter(place.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)


def _option(verb: Verb, owner: type, one: "Field[Any]") -> inspect.Parameter:
    known = about(one)
    assert known is not None
    flags = (known["flags"] or flag(one.name)).split()
    more: dict[str, Any] = {"autocompletion": known["choices"]} if known["choices"] else {}
    shown = typer.Option(
        *flags,
        help=as_options(known["help"], verb),
        metavar=known["metavar"],
        rich_help_panel=known["panel"],
        **more,
    )
    annotation: Any = Annotated[_plain_type(types(owner)[one.name]), shown]
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default(one), annotation=annotation)


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


def _plain_type(hint: Any) -> Any:
    """What a word of the command line becomes; where text is legal beside other types, the option class reads it."""
    if len(kinds(hint)) == 1:
        return hint
    return str | None if NoneType in get_args(hint) else str


def as_options(text: str, verb: Verb) -> str:
    """A text with the arguments of `verb` in backticks written as options: `keep=4` becomes --keep 4.

    Calls of the Python API become command lines.
    """
    known = {one.name: about(one) for _, one in verb.arguments()}
    places = {place.name for place in verb.places}

    def written(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        if name in places:
            return name.upper()
        said = known.get(name)
        if said is None:
            return match[0]
        on, _, off = (said["flags"] or flag(name)).partition("/")
        if value in (None, "True"):
            return on.split()[0]
        return off if value == "False" and off else f"{on.split()[0]} {value}"

    return _QUOTED.sub(written, _CALL.sub(lambda match: as_command(match[1]), text))


def as_command(call: str) -> str:
    """A call of the Python API, as the command line writes it."""
    parsed = ast.parse(call, mode="eval").body
    assert isinstance(parsed, ast.Call)
    assert isinstance(parsed.func, ast.Attribute)
    name = parsed.func.attr
    verb = next(verb for verb in VERBS if verb.python_name == name)
    places = [ast.literal_eval(place) for place in parsed.args]
    words = [shlex.quote(word) for place in places for word in ([place] if isinstance(place, str) else place)]
    options = [f"`{one.arg}={shlex.quote(str(ast.literal_eval(one.value)))}`" for one in parsed.keywords]
    return " ".join(["moetools", verb.name, *words, *(as_options(option, verb) for option in options)])
