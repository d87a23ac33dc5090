"""`import moetools.hf` makes transformers load our packed checkpoints: dequantized exactly, or with packed experts."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moetools.hf
from moetools.errors import CheckpointError
from moetools.formats.base import load_format
from moetools.grids.base import Grid, make_grid

sys.path.append(str(Path(__file__).parents[1] / "formats"))

from packing import write_packed

IDS = torch.arange(24).reshape(2, 12)


def every_width(name: str) -> Grid | None:
    """Another width for every expert, zero points for some, attention in 4 bits."""
    if ".experts." in name:
        expert = int(name.split(".experts.")[1].split(".")[0])
        return make_grid({"kind": "integer", "bits": 2 + expert % 7, "group_size": 8, "symmetric": expert % 2 == 0})
    if "self_attn" in name and name.endswith("_proj.weight"):
        return make_grid({"kind": "integer", "bits": 4, "group_size": 8})
    return None


def fused(name: str) -> Grid | None:
    return make_grid({"kind": "integer", "bits": 3}) if "input_linear" in name or "output_linear" in name else None


def pair(source: Path, folder: Path, choose: Callable[[str], Grid | None]) -> tuple[Path, Path]:
    packed, intended = write_packed(source, folder / "packed", load_format("moetools"), choose)
    plain = shutil.copytree(source, folder / "plain")
    save_file(intended, plain / "model.safetensors", metadata={"format": "pt"})
    return packed, plain


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "granitemoe"])
def test_dequantized_while_loading(family: str, tiny, tmp_path: Path, capfd) -> None:
    packed, plain = pair(tiny(family), tmp_path, fused if family == "granitemoe" else every_width)
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    found = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert torch.equal(found(IDS).logits, expected(IDS).logits)
    assert "UNEXPECTED" not in capfd.readouterr().err


def test_a_dequantized_model_is_saved_as_a_plain_one(tiny, tmp_path: Path) -> None:
    packed, plain = pair(tiny("mixtral"), tmp_path, every_width)
    AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    saved, expected = load_file(tmp_path / "saved" / "model.safetensors"), load_file(plain / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, moetools.hf.load_packed])
def test_corrupt_streams_are_refused(load: Callable, tiny, tmp_path: Path) -> None:
    packed, _ = pair(tiny("mixtral"), tmp_path, every_width)
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.2.block_sparse_moe.experts.5.w2.weight_integer"
    tensors[name][-1] ^= 1
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts.5.w2.weight' is corrupt"):
        load(packed)


def test_a_missing_tensor_is_not_left_random(tiny, tmp_path: Path) -> None:
    packed, _ = pair(tiny("mixtral"), tmp_path, every_width)
    tensors = load_file(packed / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.input_layernorm"):
        AutoModelForCausalLM.from_pretrained(packed)
