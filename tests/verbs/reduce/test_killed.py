"""A run that is killed leaves input and earlier output as they were, and can be resumed to the same bytes."""

import functools
import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.families import make_tiny

SLOW_RUN = """
import sys, time
from moetools.checkpoint import writer, durable
from moetools.cli import main
whole = writer.CheckpointWriter.write_unit
def slowly(self, *args, **kwargs):
    print("unit", args[0], flush=True, file=sys.stderr)
    whole(self, *args, **kwargs)
    time.sleep(0.3)
writer.CheckpointWriter.write_unit = slowly
sys.argv = ["moetools", *sys.argv[1:]]
main()
"""


def digest(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def arguments(model: Path, out: Path, tokens: Path, *more: str) -> list[str]:
    options = ["--data", f"t={tokens}", "--seq-len", "16", "--keep", "4", "--device", "cpu", *more]
    return ["prune-experts", str(model), str(out), *options]


def test_a_killed_run_harms_nothing_and_resumes(tmp_path: Path) -> None:
    """The whole command, stopped as a user stops it; `tests/faults` has all signals at every step."""
    how = signal.SIGINT
    model = make_tiny("mixtral", tmp_path / "model")
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (48, 16), generator=torch.Generator().manual_seed(3))}, tokens)
    out = tmp_path / "out"
    python = [sys.executable, "-m", "moetools"]
    quick = ["--no-verify", "--method"]
    subprocess.run([*python, *arguments(model, out, tokens, *quick, "random")], check=True, capture_output=True)
    before = {"model": digest(model), "out": digest(out)}

    command = [sys.executable, "-c", SLOW_RUN, *arguments(model, out, tokens, "--overwrite", "--method", "reap")]
    # A shell that starts the tests in the background makes all its children ignore Ctrl-C.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("unit layer-00001"):
                break
        time.sleep(0.1)
        process.send_signal(how)
        process.wait(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how]
    assert {"model": digest(model), "out": digest(out)} == before

    resumed = [*python, *arguments(model, out, tokens, "--overwrite", "--resume", "--method", "reap")]
    subprocess.run(resumed, check=True, capture_output=True)
    fresh = tmp_path / "fresh"
    subprocess.run([*python, *arguments(model, fresh, tokens, *quick, "reap")], check=True, capture_output=True)
    assert digest(model) == before["model"]
    assert digest(out)["model.safetensors"] == digest(fresh)["model.safetensors"]
    assert digest(out)["model.safetensors"] != before["out"]["model.safetensors"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["fresh", "model", "out", "tokens.safetensors"]
