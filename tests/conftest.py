"""Shared by all tests: tiny checkpoints of every family, made once per session, and quiet single-threaded libraries."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Two workers and the processes that tests start share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import make_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The read-only tiny checkpoint of a family; the same arguments give the same folder."""
    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            made[key] = make_tiny(family, tmp_path_factory.mktemp(family) / "model", **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def stock() -> Callable[..., Any]:
    """Stock transformers' own model of a folder, in evaluation mode; loaded once per dtype."""
    loaded: dict[tuple[Path, torch.dtype], Any] = {}

    def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
        if (path, dtype) not in loaded:
            loaded[path, dtype] = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        return loaded[path, dtype]

    return load


@pytest.fixture
def rewrite(tmp_path: Path) -> Callable[..., Path]:
    """A changed copy of a one-file checkpoint, written with the safetensors library.

    `change` gets all tensors and returns the new ones; `config` overrides keys (None removes one); `shards` deals the
    tensors out to that many files in turn, so that every layer lies in all of them.
    """

    def write(
        source: Path,
        change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
        *,
        config: dict[str, Any] | None = None,
        shards: int = 1,
    ) -> Path:
        out = tmp_path / f"rewritten-{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        merged = json.loads((source / "config.json").read_text()) | (config or {})
        (out / "config.json").write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
        tensors = change(load_file(source / "model.safetensors"))
        names = sorted(tensors)
        if shards == 1:
            save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
            return out
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            save_file({name: tensors[name] for name in names[number::shards]}, out / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names[number::shards], file)
        index = {"metadata": {}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        return out

    return write
