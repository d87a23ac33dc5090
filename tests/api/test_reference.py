"""The page and the types of the Python API are those of the catalogue."""

import ast
import importlib.resources
from pathlib import Path

import pytest

from moetools.api.functions import FUNCTIONS
from moetools.api.reference import page, stubs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("file", "text", "option"),
    [("docs/api.md", lambda: f"{page()}\n", ""), ("moetools/__init__.pyi", stubs, " --stubs")],
    ids=["page", "types"],
)
def test_generated_files_are_current(file, text, option):
    assert (ROOT / file).read_text() == text(), f"run: python -m moetools.api.reference{option} and put it in {file}"


def test_types_know_every_keyword_and_its_default():
    defined = {node.name: node for node in ast.parse(stubs()).body if isinstance(node, ast.FunctionDef)}
    assert list(defined) == list(FUNCTIONS)
    for name, function in FUNCTIONS.items():
        parameters = function.__signature__.parameters.values()
        places = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
        keywords = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
        stub = defined[name].args
        assert [one.arg for one in stub.args] == places
        typed = [
            (one.arg, ast.literal_eval(value)) for one, value in zip(stub.kwonlyargs, stub.kw_defaults, strict=True)
        ]
        assert typed == list(keywords.items())
        assert all(one.annotation is not None for one in (*stub.args, *stub.kwonlyargs))


def test_the_package_says_that_it_is_typed():
    assert importlib.resources.files("moetools").joinpath("py.typed").is_file()
