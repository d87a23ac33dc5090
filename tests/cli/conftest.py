"""Stand-ins for the verbs, so that the command line is tested without models."""

import functools
import logging
import os
import signal
import subprocess
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest

from moetools.cli.app import run
from moetools.pipeline.table import Table


@dataclass
class Report:
    """A verb's result with two numbers."""

    values: dict[str, Any] = field(default_factory=lambda: {"experts": 8, "kl": 0.25})

    def to_json(self):
        return self.values

    def tables(self):
        return [
            Table("Models", ["model", "experts", "kl"], [["original", "16", "-"], ["pruned", "8", "0.25"]], "in nats")
        ]


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def report():
    return Report()


@pytest.fixture
def stub(monkeypatch):
    """Replace `moetools.verbs.MODULE` by a module with the given names."""

    def replace(module, **names):
        name = f"moetools.verbs.{module}"
        made = types.ModuleType(name)
        made.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, made)

    return replace


@pytest.fixture
def moetools(capsys, monkeypatch):
    """Run a command line in this process."""
    for name in ("TRANSFORMERS_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))

    def command(*argv):
        code = run([str(word) for word in argv])
        assert not logging.getLogger("moetools").handlers, "a session must remove its log handler"
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return command


PRELUDE = """
import sys, types
def stub(module, **names):
    made = types.ModuleType("moetools.verbs." + module)
    made.__dict__.update(names)
    sys.modules[made.__name__] = made
class Report:
    '''More than any pipe holds.'''
    def to_json(self): return {"experts": list(range(1_000_000))}
"""


@pytest.fixture
def start():
    """Start the command line in a process of its own, after running `setup`; `stub` and `Report` are at hand there."""
    started = []

    def process(setup, *argv, **more):
        code = f"{PRELUDE}\n{setup}\nfrom moetools.cli import main\nmain({list(map(str, argv))!r})"
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more}
        # A shell that starts the tests in the background makes all its children ignore Ctrl-C.
        listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        child = subprocess.Popen([sys.executable, "-c", code], preexec_fn=listen, **options)
        started.append(child)
        return child

    yield process
    for child in started:
        if child.poll() is None:
            child.kill()
        child.communicate()
