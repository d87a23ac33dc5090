"""Every way a command can end: exit code, one clear line, and nothing on stdout that is not the result."""

import errno
import json
import logging
import signal
import subprocess
import sys

import pytest
import torch

from moetools.cli.console import describe
from moetools.errors import CheckpointError, GateError, UserError, VerificationError
from moetools.pipeline.table import Table


@pytest.fixture
def inspect(stub, moetools):
    """`moetools inspect model` with a verb that raises or returns what it is given."""

    def command(outcome, *flags):
        def verb(model):
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        stub("inspect.verb", inspect=verb)
        return moetools("inspect", "model", *flags)

    return command


def test_result_is_a_table_on_stdout(inspect, report):
    done = inspect(report)
    assert done.code == 0
    assert done.err == ""
    assert [line.split() for line in done.out.splitlines() if "─" not in line] == [
        ["Models"],
        ["model", "experts", "kl"],
        ["original", "16", "-"],
        ["pruned", "8", "0.25"],
        ["in", "nats"],
    ]
    # Numbers stand under each other's last digit.
    original, pruned = (line for line in done.out.splitlines() if "16" in line or "0.25" in line)
    assert original.index("16") + 2 == pruned.index("8") + 1


def test_json_alone_on_stdout(inspect, report):
    report.values["perplexity"] = float("inf")
    done = inspect(report, "--json")
    assert json.loads(done.out) == {"experts": 8, "kl": 0.25, "perplexity": None}


def test_wide_tables_are_not_cut_when_piped(inspect, report):
    cells = [f"cell-{place}-{'x' * 40}" for place in range(12)]
    report.tables = lambda: [Table("", cells, [cells])]
    assert inspect(report).out.splitlines()[-1].split() == cells


@pytest.mark.parametrize(
    ("error", "code"), [(UserError, 2), (CheckpointError, 1), (VerificationError, 3)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("hint", ["", "try [this]"])
def test_our_errors(inspect, error, code, hint):
    done = inspect(error("no model in [red]/x", hint=hint))
    assert (done.code, done.out) == (code, "")
    assert done.err == "error: no model in [red]/x\n" + (f"hint: {hint}\n" if hint else "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(errno.ENOSPC, "x", "out/a"), 1, "error: no space left on the disk: 'out/a'\nhint: free some space"),
        (RuntimeError("I/O error: No space left (os error 28)"), 1, "error: no space left on the disk\n"),
        (MemoryError("4 GB"), 1, "error: out of memory: 4 GB\nhint: lower --memory-budget or --batch-size\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 1, "error: out of memory: CUDA out of memory.\nhint: "),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), 1, "error: out of memory: [enforce"),
        (PermissionError(errno.EACCES, "Permission denied", "m"), 1, "error: Permission denied: 'm'\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (KeyError("layers"), 1, "internal error: KeyError: 'layers' (run again with --debug for the traceback)\n"),
    ],
    ids=["disk-full", "disk-full-rust", "memory", "cuda-memory", "cpu-memory", "permission", "ctrl-c", "bug"],
)
def test_other_errors(inspect, error, code, line):
    done = inspect(error)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(line)
    assert "Traceback" not in done.err


def test_debug_shows_the_traceback(inspect):
    done = inspect(KeyError("layers"), "--debug")
    assert "Traceback (most recent call last)" in done.err
    assert "internal error: KeyError" in done.err


def test_a_real_out_of_memory_is_recognised(stub, moetools):
    stub("inspect.verb", inspect=lambda model: torch.empty(2**60))
    assert moetools("inspect", "model").err.startswith("error: out of memory: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspekt"], "No such command 'inspekt'. Did you mean 'inspect'"),
        (["merge", "m", "o"], "no such command 'merge'"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["inspect", "m", "--jsn"], "--jsn"),
        (["prune-experts", "m", "o", "--keep", "many"], "--keep"),
        (["prune-experts", "m"], "Missing argument 'OUT'"),
    ],
)
def test_bad_usage(moetools, argv, message):
    done = moetools(*argv)
    assert (done.code, done.out) == (2, "")
    error, hint = done.err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")


def test_missed_gate_shows_the_numbers_first(stub, moetools, report):
    missed = GateError("kl 0.25 misses kl<=0.05", result=report)

    def evaluate(*args, **options):
        raise missed

    stub("evaluate.verb", evaluate=evaluate)
    done = moetools("evaluate", "m", "--gate", "kl<=0.05", "--json")
    assert done.code == 3
    assert json.loads(done.out)["kl"] == 0.25
    assert done.err == "error: kl 0.25 misses kl<=0.05\n"


SLOW = """
import pathlib, time
def prune(*args, **options):
    try:
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
    finally:
        pathlib.Path({mark!r}).touch()
stub("reduce.verb", prune_experts=prune)
"""


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated by SIGTERM")],
    ids=["ctrl-c", "sigterm"],
)
def test_signals_clean_up(start, tmp_path, number, code, message):
    cleaned = tmp_path / "cleaned"
    child = start(SLOW.format(mark=str(cleaned)), "prune-experts", "m", "o", "--keep", "2")
    assert child.stderr.readline() == "ready\n"
    child.send_signal(number)
    out, err = child.communicate(timeout=20)
    assert (child.returncode, out) == (code, "")
    assert err.splitlines() == [
        f"error: {message}",
        "hint: run it again with --resume to go on from the last finished layer",
    ]
    assert cleaned.exists()


def test_reader_that_leaves(start):
    child = start("stub('inspect.verb', inspect=lambda model: Report())", "inspect", "m", "--json")
    assert child.stdout.readline() == "{\n"
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(20) == 141


def test_full_disk_behind_stdout(start):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        child = start("stub('inspect.verb', inspect=lambda model: Report())", "inspect", "m", "--json", stdout=full)
        assert child.stderr.readline() == "error: no space left on the disk\n"
        assert child.wait(20) == 1


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "moetools", "--version"], capture_output=True, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_what_a_terminal_obeys_is_shown_escaped(inspect, report, flags):
    name = "\x1b]0;owned\x07\x9b31m\u202e"
    report.values = {name: name}
    report.tables = lambda: [Table(name, ["model", name], [[name, "\x1b[2J"]], name)]
    done = inspect(report, *flags)
    assert done.code == 0
    assert not set("\x1b\x07\x9b\u202e") & set(done.out)
    assert r"\u001b]0;owned\u0007" in done.out
    error = CheckpointError(f"no such model {name}\nsecond line", hint=name)
    done = inspect(error)
    assert not set("\x1b\x07\x9b\u202e") & set(done.err)
    assert done.err.count("\n") == 2


def test_log_lines_are_shown_escaped(stub, moetools, report):
    def verb(model):
        logging.getLogger("moetools.x").warning("reading %s", "\x1b[31m:smile:")
        return report

    stub("inspect.verb", inspect=verb)
    assert moetools("inspect", "model").err == "warning: reading \\u001b[31m:smile:\n"


@pytest.mark.parametrize(("number", "hinted"), [(errno.EIO, True), (errno.EFBIG, True), (errno.EACCES, False)])
def test_a_failing_disk_says_that_a_run_can_go_on(number: int, hinted: bool) -> None:
    message, hint, code = describe(OSError(number, "broken", "out/a"), resume="--resume")
    assert (message, "--resume" in hint, code) == ("broken: 'out/a'", hinted, 1)
    assert "--resume" not in describe(OSError(number, "broken"))[1]
