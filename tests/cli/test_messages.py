"""Errors speak of arguments in Python and of options on the command line."""

import ast
import re
from pathlib import Path

import pytest

import moetools as package
from moetools.demo import demo_data_path, demo_model_path
from moetools.verbs.catalogue import VERBS

SOURCES = Path(package.__path__[0])
TEXT = str(demo_data_path() / "code/calibration.jsonl")
# Scripts that are no part of the command line.
SCRIPTS = ("api/reference.py",)
OPTION = re.compile(r"(?<![\w-])--[a-z]")
# (verb, arguments, options, what Python says, what the command line says)
REFUSED = [
    (
        "prune_experts",
        {"keep": 4, "ratio": 0.5},
        "--keep 4 --ratio 0.5",
        ("give either `keep` or `ratio`", "for example `keep=4`, or `ratio=0.5`"),
        ("give either --keep or --ratio", "for example --keep 4, or --ratio 0.5"),
    ),
    (
        "prune_experts",
        {"keep": 2},
        "--keep 2",
        ("`keep` 2 is below top-k: every token uses 4 experts", "legal targets: 4 to 16; or merge to 1 (dense)"),
        ("--keep 2 is below top-k: every token uses 4 experts", "legal targets: 4 to 16; or merge to 1 (dense)"),
    ),
    (
        "prune_experts",
        {"keep": 8},
        "--keep 8",
        ("method 'reap' measures reap and needs text", "`data`, or `stats` from an earlier run"),
        ("method 'reap' measures reap and needs text", "--data, or --stats from an earlier run"),
    ),
    (
        "prune_experts",
        {"keep": 8, "data": TEXT, "sequential": True, "stats": "x"},
        f"--keep 8 --data {TEXT} --sequential --stats x",
        (
            "a sequential run measures anew behind every compressed layer and cannot use or save statistics",
            "`sequential=False` measures once, on the original",
        ),
        (
            "a sequential run measures anew behind every compressed layer and cannot use or save statistics",
            "--one-shot measures once, on the original",
        ),
    ),
    (
        "merge_experts",
        {"to": 8, "data": {"code": TEXT}, "heal_data": "x"},
        f"--to 8 --data code={TEXT} --heal-data x",
        ("`heal_data` without `heal`", "`heal=STEPS` says for how long"),
        ("--heal-data without --heal", "--heal STEPS says for how long"),
    ),
    (
        "quantize",
        {"bits": 2.5},
        "--bits 2.5",
        ("`bits` is for the schemes mixed and sub1; w4a16 has its own width", "`scheme=mixed` `bits=2.5`"),
        ("--bits is for the schemes mixed and sub1; w4a16 has its own width", "--scheme mixed --bits 2.5"),
    ),
    (
        "quantize",
        {"scheme": "nvfp4", "data": TEXT},
        f"--scheme nvfp4 --data {TEXT}",
        (
            "NVFP4: stock transformers forgets the global scale and loads experts about 7000 times too large",
            "`scheme=mxfp4`, or `target=vllm`",
        ),
        (
            "NVFP4: stock transformers forgets the global scale and loads experts about 7000 times too large",
            "--scheme mxfp4, or --target vllm",
        ),
    ),
    (
        "distill",
        {"data": TEXT, "warm_start": False},
        f"--data {TEXT} --no-warm-start",
        ("`init=neurons` chooses neurons in the warm start", "leave out `warm_start=False`"),
        ("--init neurons chooses neurons in the warm start", "leave out --no-warm-start"),
    ),
    (
        "inspect_routing",
        {"data": TEXT, "seq_len": 1},
        f"--data {TEXT} --seq-len 1",
        ("`seq_len=1` is too small; the least is 2", ""),
        ("--seq-len 1 is too small; the least is 2", ""),
    ),
    (
        "evaluate",
        {"data": TEXT, "gate": "kl<=1"},
        f"--data {TEXT} --gate kl<=1",
        ("gate 'kl<=1' needs a model to compare to", "name the original: `reference=MODEL`"),
        ("gate 'kl<=1' needs a model to compare to", "name the original: --reference MODEL"),
    ),
]


@pytest.mark.parametrize(
    ("name", "arguments", "options", "python", "shell"), REFUSED, ids=lambda value: value if type(value) is str else ""
)
def test_messages_name_what_the_user_wrote(moetools, tmp_path, name, arguments, options, python, shell):
    verb = next(verb for verb in VERBS if verb.python_name == name)
    places = [str(demo_model_path()), str(tmp_path / "out")][: len(verb.places)]
    with pytest.raises(package.MoetoolsError) as caught:
        getattr(package, name)(*places, **arguments)
    assert (caught.value.message, caught.value.hint) == python
    done = moetools(verb.name, *places, *options.split())
    assert done.code == caught.value.exit_code
    hint = f"hint: {shell[1]}\n" if shell[1] else ""
    assert done.err.endswith(f"error: {shell[0]}\n{hint}")


def texts(tree):
    """String constants of a module that are no docstrings, and not Typer's flags or a command line to record."""
    silent = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    silent += [key.value for key in ast.walk(tree) if isinstance(key, ast.keyword) and key.arg in ("flags", "command")]
    left_out = {part for node in silent for part in ast.walk(node) if isinstance(part, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in left_out:
            yield node.value


def test_only_the_command_line_knows_options():
    files = [file for file in SOURCES.rglob("*.py") if "cli" not in file.relative_to(SOURCES).parts]
    assert len(files) > 100
    found = [
        f"{file.relative_to(SOURCES)}: {text}"
        for file in files
        if file.relative_to(SOURCES).as_posix() not in SCRIPTS
        for text in texts(ast.parse(file.read_text()))
        if OPTION.search(text)
        # Another program's.
        and not text.startswith(" --local-dir")
    ]
    assert not found
