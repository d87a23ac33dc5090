"""What we write in stock formats is what stock transformers loads: every tensor of the model, compared exactly.

A stock process that never imports moetools loads the packed checkpoint and a plain one of the intended tensors.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from families import make_tiny
from packing import EXPERTS, LINEARS, among, write_packed
from safetensors.torch import save_file

from moetools.formats.base import load_format
from moetools.grids.base import Grid, make_grid

WIDE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
BLOCKS = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 4}
SMALL = {"num_hidden_layers": 2}
WIDTHS = {"moe_intermediate_size": 64}


def integer(bits: int, group: int | None = 8, **options: object) -> Grid:
    return make_grid({"kind": "integer", "bits": bits, "group_size": group, **options})


def two_widths(name: str) -> Grid | None:
    """Experts at 2 bits, attention, shared experts and dense layers at 4."""
    if ".experts." in name:
        return integer(2)
    linear = any(part in name for part in ("_proj", "q_a", "kv_a", "kv_b")) and name.endswith(".weight")
    return integer(4) if linear else None


CASES: dict[str, tuple[str, str, dict, Callable[[str], Grid | None], bool]] = {
    "mixtral-w4": ("mixtral", "pack-quantized", SMALL, among(LINEARS, integer(4)), True),
    "mixtral-w8-channel": ("mixtral", "pack-quantized", SMALL, among(EXPERTS, integer(8, None)), True),
    "mixtral-w3-two": ("mixtral", "pack-quantized", SMALL, two_widths, True),
    "qwen2_moe-two": ("qwen2_moe", "pack-quantized", SMALL, two_widths, True),
    "qwen2_moe-ternary": ("qwen2_moe", "pack-quantized", SMALL, among(EXPERTS, integer(2, 8, ternary=True)), True),
    "qwen3_moe-w5": ("qwen3_moe", "pack-quantized", SMALL, among(LINEARS, integer(5)), True),
    "olmoe-w3": ("olmoe", "pack-quantized", SMALL, among(LINEARS, integer(3)), True),
    "deepseek_v3-two": ("deepseek_v3", "pack-quantized", SMALL, two_widths, True),
    "mixtral-fp8": ("mixtral", "float-quantized", SMALL, among(EXPERTS, make_grid({"kind": "float8"})), True),
    # Activations of FP8 attention are rounded too, so only the weights are equal.
    "qwen2_moe-fp8": ("qwen2_moe", "float-quantized", SMALL, among(LINEARS, make_grid({"kind": "float8"})), False),
    "mixtral-fp8-block": ("mixtral", "fp8", BLOCKS, among(LINEARS, make_grid({"kind": "float8_block"})), True),
    "olmoe-mxfp4": ("olmoe", "mxfp4", WIDE, among(LINEARS, make_grid({"kind": "mxfp4"})), True),
    "qwen3_moe-mxfp4": ("qwen3_moe", "mxfp4", WIDE | WIDTHS, among(EXPERTS, make_grid({"kind": "mxfp4"})), True),
}
BROKEN: dict[str, tuple[str, str, dict, Callable[[str], Grid | None]]] = {
    "asymmetric": ("mixtral", "pack-quantized", SMALL, among(EXPERTS, integer(4, 8, symmetric=False))),
    "int8-activations": ("mixtral", "int-quantized", SMALL, among(EXPERTS, integer(8, None))),
    "nvfp4": ("mixtral", "nvfp4", WIDE, among(EXPERTS, make_grid({"kind": "nvfp4"}))),
    "attention-only": ("mixtral", "pack-quantized", SMALL, among(("self_attn",), integer(4))),
    "two-layers-two-widths": (
        "mixtral",
        "pack-quantized",
        SMALL,
        lambda name: among(EXPERTS, integer(4 if ".layers.0." in name else 2))(name),
    ),
}


def write_job(folder: Path, family: str, layout: str, options: dict, choose: Callable[[str], Grid | None]) -> Path:
    plain = make_tiny(family, folder / "plain", **options)
    _, intended = write_packed(plain, folder / "packed", load_format(layout), choose)
    save_file(intended, plain / "model.safetensors", metadata={"format": "pt"})
    (folder / "job.json").write_text(json.dumps({"dtype": "bfloat16"}))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("jobs")
    jobs = [write_job(root / name, *case[:4]) for name, case in CASES.items()]
    jobs += [write_job(root / name, *case) for name, case in BROKEN.items()]
    command = [sys.executable, str(Path(__file__).with_name("load_stock.py")), *map(str, jobs)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    shutil.rmtree(root)
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return {line.pop("job"): line for line in lines}


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_loads_exactly_what_was_meant(name: str, results: dict[str, dict]) -> None:
    found = results[name]
    assert "error" not in found, found
    assert found["wrong"] == []
    assert found["tensors"] > 10
    assert found["logits"] or not CASES[name][4]


@pytest.mark.parametrize("name", BROKEN)
def test_what_the_preflight_refuses_does_go_wrong(name: str, results: dict[str, dict]) -> None:
    """When one of these loads right, the preflight can be relaxed."""
    found = results[name]
    assert "error" in found or found["wrong"], f"{name} loads now"
