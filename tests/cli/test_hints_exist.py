"""Every argument, value and command that a hint or an error speaks of exists, read from the source of each module."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import moetools
from moetools.arguments import about
from moetools.cli.commands import as_options
from moetools.verbs.catalogue import VERBS, Verb

SOURCES = Path(moetools.__path__[0])
QUOTED = re.compile(r"`([^`]*)`")
HOLE = "\0"
# In backticks without being an argument: keys of config.json and of recipes, and what is written in Python.
OTHERS = re.compile(r"quantization_config|import moetools\.hf|model\..*\(\.\.\.\)|save_model|out")
# What stands behind the word "moetools" without being a command.
PROSE = {"works", "runs", "if"}
NO_HINTS = ("api/", "cli/", "printable.py")


def spoken_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every hint: arguments `hint=`, defaults and variables with hint in their names."""
    for node in ast.walk(tree):
        values: list[ast.expr | None] = []
        if isinstance(node, ast.keyword) and node.arg == "hint":
            values = [node.value]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = " ".join(ast.unparse(target) for target in targets)
            # Also the constants of a module, which hints are made of.
            values = [node.value] if "hint" in names.lower() or re.fullmatch("_[A-Z_]+", names) else []
        elif isinstance(node, ast.FunctionDef):
            values = [*node.args.defaults, *node.args.kw_defaults] if "hint" in ast.unparse(node.args) else []
        for value in values:
            yield from ((value.lineno, text) for text in texts(value))


def speaking_verbs(file: Path) -> list[Verb]:
    """Verbs that a module may speak to: that of its folder, else any."""
    folder = re.match(r"verbs/(\w+)", file.relative_to(SOURCES).as_posix())
    own = [verb for verb in VERBS if folder and verb.function.startswith(f"moetools.verbs.{folder[1]}.")]
    return own or list(VERBS)


def texts(node: ast.AST | None) -> Iterator[str]:
    """Strings of an expression, values that are filled in as `HOLE`."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield "".join(["".join(texts(node.left)), "".join(texts(node.right))])
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif node is not None:
        for part in ast.iter_child_nodes(node):
            yield from texts(part)


HINTS = [
    pytest.param(file, text, id=f"{name}:{line}")
    for file in sorted(SOURCES.rglob("*.py"))
    if not (name := file.relative_to(SOURCES).as_posix()).startswith(NO_HINTS)
    for line, text in spoken_of(ast.parse(file.read_text()))
    if "`" in text or "moetools " in text
]


def test_hints_are_found():
    assert len(HINTS) > 120
    assert sum("moetools.quantize(" in text for _, text in (one.values for one in HINTS)) == 3


def exists(verb: Verb, name: str, value: str | None) -> bool:
    """Whether `verb` has an argument of that name that can be given that value, as far as choices are listed."""
    if name in {place.name for place in verb.places}:
        return value is None
    for _, one in verb.arguments():
        known = about(one)
        if one.name == name and known is not None:
            legal = known["choices"]() if known["choices"] else None
            placeholder = value is None or HOLE in value or value.isupper()
            return placeholder or legal is None or value in legal
    return False


@pytest.mark.parametrize(("file", "text"), HINTS)
def test_what_a_hint_names_exists(file, text):
    verbs = speaking_verbs(file)
    for quoted in QUOTED.findall(text):
        name, equals, value = quoted.partition("=")
        if OTHERS.fullmatch(quoted) or HOLE in name:
            continue
        if quoted.startswith("moetools."):
            call = ast.parse(quoted, mode="eval").body
            (verb,) = (verb for verb in VERBS if ast.unparse(call.func) == f"moetools.{verb.python_name}")
            assert len(call.args) == len(verb.places)
            assert all(exists(verb, one.arg, str(ast.literal_eval(one.value))) for one in call.keywords)
            assert "`" not in as_options(f"`{quoted}`", verbs[0])
        else:
            assert any(exists(verb, name, value if equals else None) for verb in verbs), quoted
    commands = {verb.name for verb in VERBS}
    for word in re.findall(r"moetools ([\w-]+)", text):
        assert word in commands | PROSE, text
