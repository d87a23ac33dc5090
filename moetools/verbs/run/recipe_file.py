"""Recipes as text: YAML that is read strictly, variables, and the recipes that come with the package."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moetools.errors import UserError
from moetools.plugins import unknown_name

_VARIABLE = re.compile(r"\$\{([^{}]*)\}")
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
"""What reading YAML raises: also for text that is no UTF-8, impossible dates, numbers without end, and deep nesting."""
_SHIPPED = Path(__file__).parents[2] / "recipes"


def read_recipe(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a name of a shipped recipe stands for its file.

    Raises:
        UserError: no such file, no YAML, keys that occur twice, or something other than a mapping.
    """
    shipped = shipped_recipes()
    if not file.exists() and str(file) in shipped:
        file = shipped[str(file)]
    if not file.is_file():
        names = ", ".join(shipped)
        raise UserError(f"no recipe '{file}'", hint=f"a YAML file, or one that comes with moetools: {names}")
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), _Strict)
    except UNREADABLE as error:
        raise UserError(f"{file}: {_in_one_line(error)}", hint="see docs/compress.md for how a recipe looks") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: a recipe is a mapping with `steps`, this is {type(found).__name__}")
    return found


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {file.stem: file for file in sorted(_SHIPPED.glob("*.yaml"))}


def set_variables(declared: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """The recipe's variables, with the values that were given in place of its own.

    Args:
        given: NAME=VALUE; a name that occurs several times gets the list of its values.

    Raises:
        UserError: not of that form, or a variable that the recipe does not declare.
    """
    values: dict[str, list[str]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"`set={text}` is not NAME=VALUE", hint="for example `set=model=MODEL`")
        if name not in declared:
            raise unknown_name("variable", name, list(declared))
        values.setdefault(name, []).append(value)
    return {**declared, **{name: one[0] if len(one) == 1 else one for name, one in values.items()}}


def filled_in(value: Any, known: Mapping[str, Any]) -> Any:
    """`value` with every `${NAME}` replaced, in lists and mappings too.

    A text that is one variable becomes its value, of whatever type; a list in a list is joined to it.

    Raises:
        UserError: an unknown variable, or one without a value.
    """
    if isinstance(value, Mapping):
        return {name: filled_in(one, known) for name, one in value.items()}
    if isinstance(value, list):
        return _joined(value, [filled_in(one, known) for one in value])
    if not isinstance(value, str):
        return value
    whole = _VARIABLE.fullmatch(value)
    if whole:
        return _known(whole[1], known)
    return _VARIABLE.sub(lambda match: _text(match[1], known), value)


def _joined(before: Sequence[Any], after: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for one, filled in zip(before, after, strict=True):
        found += filled if isinstance(filled, list) and isinstance(one, str) else [filled]
    return found


def _known(name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise unknown_name("variable", name, list(known))
    if known[name] is None:
        raise UserError(f"the variable '{name}' has no value", hint=f"`set={name}=VALUE`")
    return known[name]


def _text(name: str, known: Mapping[str, Any]) -> str:
    value = _known(name, known)
    if isinstance(value, list | dict | bool):
        raise UserError(f"the variable '{name}' is {value!r}, which cannot stand inside other text")
    return str(value)


class _Strict(yaml.SafeLoader):
    """Refuses keys that are no text or occur twice (YAML would keep the last), references, and text no path can have.

    A reference to a node can make a document endless, or larger than memory; a recipe has variables.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise _refused(
                "references to other parts (*NAME) are not read; use a variable", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused("a key is a word", key.start_mark)
            if key.value in seen:
                raise _refused(f"'{key.value}' occurs twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in node.value):
            raise _refused("text with a character that no text has", node.start_mark)
        return super().construct_scalar(node)


def _refused(what: str, where: yaml.Mark) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, what, where)


def _in_one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    said = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {said}" if mark else " ".join(said.split())
