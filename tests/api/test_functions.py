"""`moetools.prune_experts(...)` and the like: what they take, refuse, return and record."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import moetools
from moetools.api.functions import FUNCTIONS, signature
from moetools.demo import demo_data_path, demo_model_path
from moetools.errors import CheckpointError, GateError, UserError
from moetools.verbs.catalogue import VERBS

each_verb = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
TEXT = {"code": demo_data_path() / "code/calibration.jsonl"}
SMALL = {"data": TEXT, "seq_len": 64, "samples": 4, "device": "cpu"}


def definition(verb):
    """The verb's function as it is written, without importing it."""
    module, _, name = verb.function.rpartition(".")
    file = Path(*moetools.__path__, *module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(file.read_text())
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)


@each_verb
def test_the_catalogue_says_what_the_function_takes_and_returns(verb):
    function = definition(verb)
    positional = [argument.annotation.id for argument in function.args.args[len(verb.places) :]]
    assert positional == [kind.__name__ for kind in verb.options]
    keywords = {argument.arg for argument in function.args.kwonlyargs}
    assert keywords == ({"progress"} if verb.options else set()) | ({"command"} if verb.writes else set())
    assert ast.unparse(function.returns) == verb.returns.rpartition(".")[2]
    module, _, name = verb.returns.partition(" ")[0].rpartition(".")
    assert getattr(importlib.import_module(module), name).__module__ == module


@each_verb
def test_places_come_first_and_all_else_is_a_keyword(verb):
    function = getattr(moetools, verb.python_name)
    parameters = list(inspect.signature(function).parameters.values())
    count = len(verb.places)
    assert {one.kind for one in parameters[:count]} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert {one.kind for one in parameters[count:]} <= {inspect.Parameter.KEYWORD_ONLY}
    described = inspect.getdoc(function)
    assert all(f"\n    {one.name}: " in described for one in parameters)
    assert max(map(len, described.splitlines())) <= 116


def test_asking_for_functions_imports_no_torch():
    code = (
        "import sys, moetools; assert 'typer' not in sys.modules; dir(moetools); moetools.prune_experts\n"
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names():
    assert set(FUNCTIONS) <= set(dir(moetools))
    assert moetools.MoetoolsError in UserError.__mro__
    with pytest.raises(AttributeError, match="module 'moetools' has no attribute 'prune'"):
        _ = moetools.prune


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: moetools.prune_experts("m", "o", kep=3),
            r"prune_experts\(\) got an unexpected keyword argument 'kep'; did you mean 'keep'\?",
        ),
        (lambda: moetools.merge_experts("m", "o", zzz=3), r"merge_experts\(\) got an unexpected .* 'zzz'$"),
        (lambda: moetools.prune_experts("m"), r"prune_experts\(\): missing a required argument: 'out'"),
        (lambda: moetools.prune_experts("m", "o", 8), r"prune_experts\(\): too many positional arguments"),
        (lambda: moetools.inspect("m", progress=True), r"inspect\(\) got an unexpected .* 'progress'"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "8"}, "`keep='8'` is of type str; legal: int, None"),
        ({"keep": True}, "`keep=True` is of type bool; legal: int, None"),
        ({"keep": 8.0}, "`keep=8.0` is of type float; legal: int, None"),
        ({"ratio": "half"}, "`ratio='half'` is of type str; legal: float, None"),
        ({"shuffle": 1}, "`shuffle=1` is of type int; legal: bool"),
        ({"method": ["reap"]}, "`method=['reap']` is of type list; legal: str, None"),
        ({"method": 3}, "`method=3` is of type int; legal: str, None"),
        ({"stats": 3}, "`stats=3` is of type int; legal: path, None"),
        ({"data": 3}, "`data=3` is of type int; legal: str, list or dict of str"),
        ({"data": [3]}, "`data=[3]` is of type list; legal: str, list or dict of str"),
        ({"data": {"a": 3}}, "`data={'a': 3}` is of type dict; legal: str, list or dict of str"),
        ({"samples": 1.5}, "`samples=1.5` is of type float; legal: int, 'all', None"),
        ({"seq_len": None}, "`seq_len=None` is of type NoneType; legal: int"),
        ({"seq_len": 10**30}, "`seq_len` is a number of 31 digits; legal: up to 1,125,899,906,842,624"),
        ({"seed": -1}, "`seed=-1` is not between 0 and 4294967295"),
        ({"seed": 2**32}, "`seed=4294967296` is not between 0 and 4294967295"),
    ],
)
def test_values_of_a_wrong_type(options, message):
    with pytest.raises(UserError) as caught:
        moetools.prune_experts("model", "out", **options)
    assert caught.value.message == message


def test_a_place_must_be_a_path():
    with pytest.raises(UserError, match=r"`model=3` is of type int; legal: path"):
        moetools.inspect(3)
    with pytest.raises(CheckpointError, match="nowhere"):
        moetools.inspect("nowhere")


def test_a_model_is_pruned(tmp_path, capsys):
    out = tmp_path / "out"
    report = moetools.prune_experts(demo_model_path(), out, keep=8, method="frequency", **SMALL)
    assert type(report).__name__ == inspect.signature(moetools.prune_experts).return_annotation == "ReduceReport"
    assert json.loads((out / "config.json").read_text())["num_experts"] == 8
    data = {"code": str(TEXT["code"])}
    assert report.command == (
        f"moetools.prune_experts('{demo_model_path()}', '{out}', keep=8, method='frequency', "
        f"data={data}, seq_len=64, samples=4, device='cpu')"
    )
    assert json.loads((out / "moetools.json").read_text())["command"] == report.command
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tokens/s" not in captured.err
    with pytest.raises(UserError) as caught:
        moetools.prune_experts(demo_model_path(), out, keep=8, **SMALL)
    assert caught.value.hint == "choose another name, or replace it with `overwrite`"


def test_models_are_compared_with_a_bar(capsys):
    model = demo_model_path()
    measured = moetools.evaluate(model, progress=True, **SMALL)
    assert "tokens/s" in capsys.readouterr().err
    with pytest.raises(GateError) as caught:
        moetools.evaluate([model], gate="perplexity.code<=1", **SMALL)
    assert "perplexity.code<=1 is missed with" in caught.value.message
    assert type(caught.value.result) is type(measured)


def test_signature_is_made_of_types_that_are_accepted():
    parameters = signature(next(verb for verb in VERBS if verb.name == "evaluate")).parameters
    assert parameters["models"].annotation == parameters["models"].annotation | str
    assert str(parameters["reference"].annotation) == "str | os.PathLike[str] | None"
    assert str(parameters["gate"].annotation) == "str | collections.abc.Sequence[str]"
