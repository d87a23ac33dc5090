"""A recipe that was checked: its steps, with the options of their verbs.

What is legal in a step is what its verb's option classes say; there is no second description of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from moetools.arguments import about, read, types
from moetools.errors import UserError
from moetools.plugins import unknown_name
from moetools.text.task_names import RULE, folder_fault, name_fault
from moetools.verbs.catalogue import VERBS, Verb
from moetools.verbs.run.recipe_file import UNREADABLE, filled_in, read_recipe, set_variables

REPORT = "report"
COMPARE = next(verb for verb in VERBS if verb.name == "compare")
_KEYS = ("about", "variables", "out", "options", "steps", REPORT)
_STEP_KEYS = ("name", "verb", "options", "keep")
_NOT_IN_A_RECIPE = ("run", "demo")
_OURS = ("overwrite", "resume", "dry_run")
"""Options that the run itself gives to its steps."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One verb with what it gets.

    Attributes:
        places: of the verb, by name, without its output.
        options: by name; the others have their defaults.
        keep: its output stays when the run is over.
        out: its output; None for a verb that writes none.
    """

    name: str
    verb: Verb
    places: Mapping[str, Any]
    options: Mapping[str, Any]
    keep: bool = False
    out: Path | None = None

    def instances(self) -> list[Any]:
        """The verb's option classes."""
        return self.verb.instances(self.options)

    def words(self) -> str:
        """What it does, in a line; text and numbers, no paths."""
        said = {name: value for name, value in self.options.items() if isinstance(value, str | int | float)}
        return " ".join(f"{name}={value}" for name, value in said.items())


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A chain of verbs.

    Attributes:
        out: the folder of all outputs, each under its step's name.
        report: the comparison at the end, without its models: they are what the steps made.
    """

    about: str
    out: Path
    steps: tuple[Step, ...]
    report: Step | None = None

    def everything(self) -> tuple[Step, ...]:
        """The steps, and the report."""
        return (*self.steps, *([self.report] if self.report else ()))


def load_recipe(file: Path, given: Sequence[str]) -> Recipe:
    """The recipe in `file`, with the variables that were given (NAME=VALUE).

    Raises:
        UserError: what is wrong with it, naming the step.
    """
    found = read_recipe(file)
    _check_keys(found, _KEYS, "key of the recipe")
    declared = _mapping(found.get("variables"), "variables")
    known = set_variables(declared, given)
    out = Path(read("out", filled_in(_required(found, "out"), known), str))
    written = found.get("steps")
    if not isinstance(written, list) or not written:
        raise UserError("`steps` of the recipe is not a list of steps")
    shared = filled_in(_mapping(found.get("options"), "options"), known)
    steps: list[Step] = []
    for one in written:
        step = _step(_mapping(one, "a step"), known, out, shared)
        if step.name in known:
            raise UserError(f"step '{step.name}' is called as another step or a variable")
        known[step.name] = str(step.out) if step.out else None
        steps.append(step)
    report = _report(found[REPORT], known, shared) if REPORT in found else None
    _check_shared(shared, [*steps, *([report] if report else [])])
    return Recipe(about=str(found.get("about", "")), out=out, steps=tuple(steps), report=report)


def recipe_text(recipe: Recipe, variables: Mapping[str, Any]) -> str:
    """The recipe as a YAML file that `load_recipe` reads back.

    Args:
        variables: name -> value; what equals one of the values is written as the variable.
    """

    def plain(value: Any) -> Any:
        for name, one in variables.items():
            if value == one or (isinstance(value, Path) and str(value) == one):
                return f"${{{name}}}"
        for step in recipe.steps:
            if value == step.out or (step.out is not None and value == str(step.out)):
                return f"${{{step.name}}}"
        return str(value) if isinstance(value, Path) else value

    def written(step: Step) -> dict[str, Any]:
        places = {name: plain(value) for name, value in step.places.items()}
        options = {name: plain(value) for name, value in step.options.items()}
        kept = {"keep": True} if step.keep else {}
        return {"name": step.name, "verb": step.verb.name, **places, "options": options, **kept}

    whole: dict[str, Any] = {
        "about": recipe.about,
        "variables": dict(variables),
        "out": plain(str(recipe.out)),
        "steps": [written(step) for step in recipe.steps],
    }
    if recipe.report is not None:
        whole[REPORT] = {name: plain(value) for name, value in recipe.report.options.items()}
    return yaml.dump(whole, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=110)


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice: recipes have no references."""

    def ignore_aliases(self, _: Any) -> bool:
        return True


def _step(written: Mapping[str, Any], known: Mapping[str, Any], out: Path, shared: Mapping[str, Any]) -> Step:
    name = written.get("name")
    if not isinstance(name, str) or name_fault(name) or folder_fault(name):
        raise UserError(f"`name` of a step is {name!r}", hint=f"a folder is called so: {RULE}")
    try:
        verb = _verb(written.get("verb"))
        inputs = [place for place in verb.places if place.name != "out"]
        _check_keys(written, (*_STEP_KEYS, *(place.name for place in inputs)), "key")
        places = {place.name: place.read(filled_in(_required(written, place.name), known)) for place in inputs}
        options = _options(verb, filled_in(_mapping(written.get("options"), "options"), known), shared)
        keep = read("keep", written.get("keep", False), bool)
    except UserError as error:
        raise UserError(f"step '{name}': {error.message}", hint=error.hint) from None
    return Step(
        name=name, verb=verb, places=places, options=options, keep=keep, out=out / name if verb.writes else None
    )


def _report(written: Any, known: Mapping[str, Any], shared: Mapping[str, Any]) -> Step:
    try:
        options = _options(COMPARE, filled_in(_mapping(written, REPORT), known), shared)
    except UserError as error:
        raise UserError(f"{REPORT}: {error.message}", hint=error.hint) from None
    return Step(name=REPORT, verb=COMPARE, places={}, options=options)


def _verb(name: Any) -> Verb:
    legal = {verb.name: verb for verb in VERBS if verb.name not in _NOT_IN_A_RECIPE}
    if not isinstance(name, str) or name not in legal:
        raise unknown_name("verb", str(name)[:60], list(legal))
    return legal[name]


def _options(verb: Verb, own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """A step's options, and those of all steps that its verb knows; each of its type."""
    hints = {one.name: types(owner)[one.name] for owner, one in verb.arguments() if one.name not in _OURS}
    for name in own:
        if name in _OURS and verb.writes:
            raise UserError(f"`{name}` is not for a step: the run decides it")
        if name not in hints:
            raise unknown_name(f"option of {verb.name}", name, list(hints))
    values = {**{name: value for name, value in shared.items() if name in hints}, **own}
    read_values = {name: _typed(name, value, hints[name]) for name, value in values.items()}
    verb.instances(read_values)
    return read_values


def _typed(name: str, value: Any, hint: Any) -> Any:
    """A value of a recipe; text that was given for a variable is read as YAML where the option takes no text."""
    try:
        return read(name, value, hint)
    except UserError:
        if not isinstance(value, str):
            raise
        try:
            return read(name, yaml.safe_load(value), hint)
        except UNREADABLE:
            return read(name, value, hint)


def _check_shared(shared: Mapping[str, Any], steps: Sequence[Step]) -> None:
    known = {one.name for step in steps for kind in step.verb.options for one in fields(kind) if about(one) is not None}
    for name in shared:
        if name not in known - set(_OURS):
            raise unknown_name("option of all steps", name, sorted(known - set(_OURS)))


def _check_keys(found: Mapping[str, Any], legal: Sequence[str], kind: str) -> None:
    for name in found:
        if name not in legal:
            raise unknown_name(kind, str(name), list(legal))


def _required(found: Mapping[str, Any], name: str) -> Any:
    if found.get(name) is None:
        raise UserError(f"`{name}` is missing")
    return found[name]


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{what} of the recipe is not a mapping of names: {str(value)[:60]!r}")
    return value
