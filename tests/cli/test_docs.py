"""Documents that must not drift from the program: every command in them is run, on small inputs."""

import ast
import inspect
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

import moetools as package
from moetools.api.functions import FUNCTIONS
from moetools.cli.app import app
from moetools.cli.commands import flag
from moetools.demo import demo_data_path, demo_model_path
from moetools.verbs.catalogue import VERBS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?:sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
BY_NAME = {verb.name: verb for verb in VERBS}
# Added to every command that takes it; to those that give more; and to those that give the other: the last one counts.
ALWAYS = {"samples": "16", "seq_len": "64", "local_steps": "1", "train_batch_size": "1", "device": "cpu"}
AT_MOST = {"keep": 8, "to": 8, "steps": 1, "heal": 1, "tune_router": 1}
INSTEAD = {"max_minutes": "steps", "epochs": "steps"}
# What would take too long here, or does not fit a tiny model; tests/verbs has the rest.
INSTEAD_OF_ALL = {"demo": ["--quick"], "run": ["--dry-run"], "compress": ["--dry-run", "--target-size", "80%"]}
# What an argument names is made before the command is run; all other arguments are taken as they stand.
MODELS = ("model", "teacher", "models", "reference", "student", "tokenizer")
TEXTS = ("data", "calibration", "heal_data", "test")
TASKS = ("code", "prose", "french", "arithmetic")
TINY = {
    "vocab_size": 2048,
    "num_hidden_layers": 2,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [],
}
# Half a minute: it makes what the other commands get in a moment, and tests/verbs runs it.
SLOW = ("demo",)


def command_lines():
    """(page, words behind `moetools`) of every command in a block of shell lines, each once."""
    seen = set()
    for page in PAGES:
        for block in BLOCK.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                for words in parts(shlex.split(line.removeprefix("$ "), comments=True)):
                    if words[:1] == ["moetools"] and tuple(words) not in seen:
                        seen.add(tuple(words))
                        yield pytest.param(words[1:], id=f"{page.name}: {' '.join(words)[:70]}")


def parts(words):
    """The commands of one line, without what their output is written to."""
    found = [[]]
    for word in words:
        if word in ("&&", ";", "|"):
            found.append([])
        else:
            found[-1].append(word)
    return [part[: part.index(">")] if ">" in part else part for part in found]


def parsed(argv):
    """What the command line makes of its words, by argument."""
    command = typer.main.get_command(app).commands[argv[0]]
    return command.make_context(argv[0], list(argv[1:])).params


def smaller(argv, given):
    """The command with the numbers of a test."""
    legal = {one.name for _, one in BY_NAME[argv[0]].arguments()}
    words = [word for name, value in ALWAYS.items() if name in legal for word in (flag(name), value)]
    for name, most in AT_MOST.items():
        if given.get(name) and given[name] > most:
            words += [flag(name), str(most)]
    if given.get("scheme") == "sub1":
        # Tables and headers of a matrix of 32 x 32 alone take more than a bit per weight.
        words += [flag("bits"), "2"]
    for name, other in INSTEAD.items():
        if given.get(name):
            words += [flag(other), "1"]
    return [
        *argv,
        *words,
        *{"demo": ["--quick"], "run": ["--dry-run"], "compress": ["--dry-run", "--target-size", "80%"]}.get(
            argv[0], []
        ),
    ]


def values(value):
    """Paths that one argument names."""
    several = value if isinstance(value, list) else [] if value is None else [value]
    return [Path(str(one).rpartition("=")[2]) for one in several]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, tiny):
    """Small inputs: a model with a tokenizer and its quantized form, tokens, questions."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny("qwen2_moe", **TINY), folder / "model")
    for file in demo_model_path().glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    package.quantize(folder / "model", folder / "packed", method="rtn", scheme="w8a16", verify=False)
    questions = (demo_data_path() / "choice/code.jsonl").read_text().splitlines(keepends=True)
    (folder / "choices.jsonl").write_text("".join(questions[:4]))
    save_file({"input_ids": torch.arange(1024).reshape(16, 64)}, folder / "tokens.safetensors")
    return folder


def prepare(argv, given, stand_ins):
    """Put everything in place that the command reads, under the names that the document gives it."""
    made = dict.fromkeys(values(given.get("choices")), stand_ins / "choices.jsonl")
    for name in MODELS:
        source = "packed" if given.get("expand") and name == "model" else "model"
        made |= dict.fromkeys(values(given.get(name)), stand_ins / source)
    texts = dict.fromkeys(path for name in TEXTS for path in values(given.get(name)))
    for path, task in zip(texts, itertools.cycle(TASKS), strict=False):
        tokens = path.suffix == ".safetensors"
        made[path] = stand_ins / "tokens.safetensors" if tokens else demo_data_path() / task / "test.jsonl"
    for path, source in made.items():
        # A text without a suffix is a folder of texts.
        folder = path if source.is_file() and not path.suffix else path.parent
        folder.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
    for path in values(given.get("stats")):
        text = {"data": demo_data_path() / "code/test.jsonl", "samples": 16, "seq_len": 64}
        made_by = package.inspect_routing if argv[0] == "inspect-routing" else package.prune_experts
        more = {} if argv[0] == "inspect-routing" else {"out": "unused", "keep": 8, "verify": False}
        made_by(stand_ins / "model", save_stats=path, **more, **text)


@pytest.mark.parametrize("argv", list(command_lines()))
def test_command_lines_in_the_documents_run(argv, stand_ins, moetools, monkeypatch, tmp_path):
    if argv[0].startswith("-"):
        assert argv[0] in {option for param in typer.main.get_command(app).params for option in param.opts}
        return
    given = parsed(argv)
    # What a recipe reads is given as its variables.
    for variable in given.get("set", []):
        name, _, value = variable.partition("=")
        given.setdefault(name, []).append(value)
    if argv[0] in SLOW and "MOETOOLS_TEST_DOCS" not in os.environ:
        pytest.skip("MOETOOLS_TEST_DOCS=1 runs it, too")
    monkeypatch.chdir(tmp_path)
    prepare(argv, given, stand_ins)
    done = moetools(*smaller(argv, given))
    assert done.code in ((0, 3) if given.get("gate") else (0,)), done.err
    assert done.out


def test_the_first_example_of_the_readme_runs_as_it_stands(moetools, monkeypatch, tmp_path):
    if "MOETOOLS_TEST_DOCS" not in os.environ:
        pytest.skip("MOETOOLS_TEST_DOCS=1 runs it, too: it takes minutes")
    first = next(words for words in command_lines()).values[0]
    assert first[0] == "compress"
    (tmp_path / "moetools").symlink_to(ROOT / "moetools")
    monkeypatch.chdir(tmp_path)
    done = moetools(*first)
    assert done.code == 0, done.err
    asked = parsed(first)
    size = sum(file.stat().st_size for file in (tmp_path / asked["out"]).glob("*.safetensors"))
    assert size <= 0.25 * sum(file.stat().st_size for file in demo_model_path().glob("*.safetensors"))


def calls():
    """Calls of the Python API in the documents."""
    for page in PAGES:
        for block in PYTHON.findall(page.read_text()):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("moetools.") in FUNCTIONS:
                    yield pytest.param(node, id=f"{page.name}: {ast.unparse(node)[:70]}")


@pytest.mark.parametrize("call", list(calls()))
def test_calls_in_the_documents_fit(call):
    assert ast.unparse(call.func).startswith("moetools.")
    inspect.signature(getattr(package, call.func.attr)).bind(
        *call.args, **{one.arg: one.value for one in call.keywords}
    )


def test_the_reference_is_current():
    done = subprocess.run([sys.executable, "-m", "moetools.cli.reference"], capture_output=True, text=True, check=True)
    assert (ROOT / "docs/cli.md").read_text() == done.stdout, "run: python -m moetools.cli.reference > docs/cli.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_ci_runs_the_test_command_of_the_readme():
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    commands = [line for block in blocks for line in block.splitlines() if line.endswith("python -m pytest")]
    assert len(commands) == 1
    # CI makes an environment of its own, elsewhere.
    steps = [step for step in commands[0].split(" && ") if ".venv" not in step]
    assert len(steps) == 3
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert [line.removesuffix(" --durations=10") for line in lines if line.startswith(("pip ", "python "))] == steps
