"""Help, version and completion: complete, and without torch or transformers."""

import subprocess
import sys
import time

import pytest
import typer

from moetools import __version__
from moetools.cli.app import COMMANDS, app
from moetools.plugins import plugin_names

HEAVY = ("torch", "transformers", "numpy", "sklearn", "safetensors")
PROBE = f"""
import sys
from moetools.cli.app import run
code = run(sys.argv[1:])
loaded = [name for name in {HEAVY!r} if name in sys.modules]
print("HEAVY", loaded)
sys.exit(code)
"""
# (command line, exit code): help, version, and every error that can be told from the command line alone.
LIGHT = [
    (["--help"], 0),
    (["--version"], 0),
    *[([name, "--help"], 0) for name in COMMANDS],
    (["distill", "-h"], 0),
    (["prune-experts", "model", "out", "--bogus"], 2),
    (["prune-experts", "model"], 2),
]


@pytest.mark.parametrize(("argv", "code"), LIGHT, ids=[" ".join(argv) for argv, _ in LIGHT])
def test_help_imports_nothing_heavy(argv, code):
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PROBE, *argv], capture_output=True, text=True, check=False)
    sys.stdout.write(f"{' '.join(argv)}: {time.perf_counter() - began:.2f} s\n")
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_every_option_is_explained():
    group = typer.main.get_command(app)
    assert list(group.commands) == list(COMMANDS)
    for name, command in group.commands.items():
        assert command.help, name
        assert all(param.help for param in command.params), name
        assert {"--json", "--quiet", "--debug"} <= {option for param in command.params for option in param.opts}


@pytest.mark.parametrize(("command", "package"), [("prune-experts", "prune"), ("merge-experts", "merge")])
def test_method_help_names_the_methods_found(moetools, command, package):
    shown = moetools(command, "--help").out
    assert all(name in shown for name in plugin_names(f"moetools.methods.{package}"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_the_exit_codes(moetools, name):
    assert "Exit codes: 0 done, 1 failed, 2 bad usage, 3 verification" in " ".join(moetools(name, "--help").out.split())


def test_version(moetools):
    assert moetools("--version").out == f"moetools {__version__}\n"


def test_completion_offers_commands_and_methods():
    def complete(words, number):
        environment = {"_MOETOOLS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        call = [sys.executable, "-c", "from moetools.cli import main; main()"]
        return subprocess.run(call, env=environment, capture_output=True, text=True, check=False).stdout.split()

    assert complete("moetools pr", 1) == ["prune-experts"]
    assert complete("moetools merge-experts --method ", 3) == [
        *plugin_names("moetools.methods.merge"),
        "auto",
    ]
