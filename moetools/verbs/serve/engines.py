"""The engines that serve-check knows, and which form of a checkpoint each of them reads."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetools.checkpoint.folder import read_json_object
from moetools.errors import UserError
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.forward.uneven import EXPERTS_PER_LAYER
from moetools.plugins import unknown_name

_SCRIPT = Path(__file__).with_name("_engine_process.py")
_SPLIT = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")
_ERROR = re.compile(r"\w*(Error|Exception)\b")
_PREFIX = re.compile(r"^\(.*?\)\s*(ERROR.*?\]\s*)?")
"""What engines of several processes write in front of a line."""


class RefusedError(Exception):
    """What an engine is not even tried with, and why."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine.

    Attributes:
        module: what its Python must be able to import.
        packages: names it has on PyPI, for its version.
        form: the file or folder of a checkpoint that it reads; raises `RefusedError` where there is none.
        environment: variables it needs.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    form: Callable[[Path], Path]
    environment: Mapping[str, str]


def _any_folder(model: Path) -> Path:
    return model


def _stock_folder(model: Path) -> Path:
    config = read_json_object(model / "config.json")
    if EXPERTS_PER_LAYER in config:
        raise RefusedError("layers have different numbers of experts: moetools.hf loads it")
    packing = config.get("quantization_config")
    if isinstance(packing, dict) and packing.get("quant_method") == "moetools":
        raise RefusedError("packed in moetools' own format: moetools.hf loads it, `quantize` with `expand` unpacks it")
    return model


def _gguf(model: Path) -> Path:
    files = sorted(file for file in model.glob("*.gguf") if (_SPLIT.search(file.name) or [0, "00001"])[1] == "00001")
    if not files:
        raise RefusedError("no .gguf file in the folder: `quantize` with `format=gguf` writes one")
    return files[0]


def _mlx(model: Path) -> Path:
    if (model / "mlx/config.json").is_file():
        return model / "mlx"
    if isinstance(open_model(model), PackedCheckpoint):
        raise RefusedError("no folder mlx/ in it: `quantize` with `format=mlx` writes one")
    return _stock_folder(model)


_VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            name="transformers",
            module="transformers",
            packages=("transformers",),
            form=_stock_folder,
            environment={},
        ),
        Engine(name="moetools.hf", module="moetools.hf", packages=("moetools",), form=_any_folder, environment={}),
        Engine(name="vllm", module="vllm", packages=("vllm", "vllm-cpu"), form=_stock_folder, environment=_VLLM),
        Engine(name="sglang", module="sglang", packages=("sglang",), form=_stock_folder, environment={}),
        Engine(name="llama.cpp", module="llama_cpp", packages=("llama-cpp-python",), form=_gguf, environment={}),
        Engine(name="mlx", module="mlx_lm", packages=("mlx-lm",), form=_mlx, environment={}),
    )
}


def chosen_engines(asked: list[str]) -> list[tuple[Engine, str]]:
    """(engine, path of its Python) for every `NAME` or `NAME=PYTHON`; without any, all engines in this Python.

    Raises:
        UserError: an engine that is not known, or a Python that is not there.
    """
    pairs = [entry.partition("=")[::2] for entry in asked] or [(name, "") for name in ENGINES]
    for name, python in pairs:
        if name not in ENGINES:
            raise unknown_name("engine", name, list(ENGINES))
        if python and not os.access(python, os.X_OK):
            raise UserError(f"`engine={name}={python}`: no program there", hint="the path of that environment's python")
    return [(ENGINES[name], python or sys.executable) for name, python in pairs]


def is_installed(engine: Engine, python: str) -> bool:
    """Whether a Python has the engine's module; nothing of it is imported."""
    if python == sys.executable:
        return importlib.util.find_spec(engine.module) is not None
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1].split('.')[0]) is None)"
    return subprocess.run([python, "-c", code, engine.module], capture_output=True, check=False).returncode == 0


def ask(engine: Engine, python: str, request: Mapping[str, Any], *, device: str, timeout: int) -> dict[str, Any]:
    """The answer of an engine in a process of its own; {"error": text} if it failed, ended or took too long.

    Args:
        request: what `_engine_process.py` reads.
        device: on `cpu` the engine sees no GPU.
    """
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | dict(engine.environment)
    variables |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    if python != sys.executable:
        # What this process was told to import is not for another environment.
        variables.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory(prefix="moetools-") as folder:
        asked, answered, said = (Path(folder) / name for name in ("request.json", "answer.json", "said.txt"))
        asked.write_text(json.dumps({**request, "engine": engine.name, "module": engine.module}))
        command = [python, "-W", "ignore", str(_SCRIPT), str(asked), str(answered)]
        with said.open("w") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables, start_new_session=True
            )
            ended = _wait(process, timeout)
        if answered.is_file():
            answer: dict[str, Any] = json.loads(answered.read_text())
            return _with_cause(answer, said)
        return {
            "error": f"took over {timeout} s" if not ended else f"ended with code {process.returncode}: {_last(said)}"
        }


def _wait(process: "subprocess.Popen[bytes]", timeout: int) -> bool:
    """Whether it ended by itself; it and what it started are gone afterwards."""
    try:
        process.wait(timeout)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _with_cause(answer: dict[str, Any], said: Path) -> dict[str, Any]:
    """The error of an engine that starts processes of its own says only that they failed; they said why."""
    if "error" in answer and "root cause" in answer["error"]:
        return {"error": _last(said)}
    return answer


def _last(said: Path) -> str:
    """The first error that was printed, or the last line."""
    lines = [_PREFIX.sub("", line.strip()) for line in said.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or ["nothing was said"])[0 if errors else -1][:400]
