"""Documents that must not drift from the program."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from moetools.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def command_lines():
    for page in PAGES:
        for block in BLOCK.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ")
                if line.startswith("moetools "):
                    yield pytest.param(shlex.split(line, comments=True)[1:], id=f"{page.name}: {line[:60]}")


def test_the_reference_is_current():
    done = subprocess.run([sys.executable, "-m", "moetools.cli.reference"], capture_output=True, text=True, check=True)
    assert (ROOT / "docs/cli.md").read_text() == done.stdout, "run: python -m moetools.cli.reference > docs/cli.md"


@pytest.mark.parametrize("argv", list(command_lines()))
def test_command_lines_in_the_documents_parse(argv):
    group = typer.main.get_command(app)
    name, *rest = argv
    if not name.startswith("-"):
        group.commands[name].make_context(name, list(rest))


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
