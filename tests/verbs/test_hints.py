"""What a hint advises works: every hint of this list is carried out as it reads."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moetools
from moetools.architectures.base import find_architecture
from moetools.checkpoint.folder import read_json_object
from moetools.errors import MoetoolsError, UserError
from moetools.verbs.reduce.work import resolve_target


@pytest.fixture
def ids(tmp_path: Path) -> str:
    file = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (8, 16), generator=torch.Generator().manual_seed(0))}, file)
    return str(file)


def alternatives(hint: str) -> list[dict[str, Any]]:
    """The options of every alternative that a hint names, as arguments."""
    parts = [re.findall(r"`(\w+)=([^`]+)`", part) for part in re.split(r"[;,]|\bor\b", hint)]
    return [{name: int(value) if value.isdigit() else value for name, value in part} for part in parts if part]


def advised(hint: str) -> dict[str, Any]:
    return next(iter(alternatives(hint)), {})


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("qwen3_moe", {"scheme": "w4a16", "group_size": 7}),
        ("qwen3_moe", {"scheme": "fp8-block"}),
        ("qwen3_moe", {"scheme": "w8a8"}),
        ("qwen3_moe", {"scheme": "nvfp4"}),
        ("gpt_oss", {"scheme": "w4a16", "format": "compressed-tensors"}),
        ("gpt_oss", {"scheme": "w4a16", "target": "vllm"}),
        ("qwen3_moe", {"scheme": "mixed", "format": "compressed-tensors", "target": "vllm"}),
        ("mixtral", {"scheme": "w4a16", "format": "compressed-tensors", "embeddings": "w4a16"}),
        ("qwen3_moe", {"scheme": "w4a16", "asymmetric": True}),
        ("qwen3_moe", {"scheme": "w4a16", "asymmetric": True, "target": "both"}),
        ("qwen3_moe", {"scheme": "w4a16", "method": "gptq"}),
    ],
)
def test_what_quantize_advises(family: str, wrong: dict, ids: str, tiny, tmp_path: Path) -> None:
    """Every alternative by itself; GGUF lacks a tokenizer here."""
    asked = {"method": "rtn", **wrong}
    # NVFP4 packs 16 columns.
    model = tiny(family, **({"hidden_size": 32, "moe_intermediate_size": 32} if wrong["scheme"] == "nvfp4" else {}))
    more = {"data": [ids], "seq_len": 16} if wrong["scheme"] == "mixed" else {}
    with pytest.raises(UserError) as caught:
        moetools.quantize(model, tmp_path / "out", **asked, **more)
    ways = [way for way in alternatives(caught.value.hint) if way.get("format") != "gguf" and "expand" not in way]
    assert ways, caught.value
    for way in ways:
        moetools.quantize(model, tmp_path / "out", **{**asked, **way}, **more, dry_run=True)


@pytest.mark.parametrize(
    "mix",
    [
        {"scheme": "w4a16", "attention": "fp8", "format": "compressed-tensors"},
        {"scheme": "fp8", "attention": "w4a16"},
        {"scheme": "w4a16", "attention": "fp8"},
        {"scheme": "w4a16", "embeddings": "fp8"},
    ],
)
def test_mixes_that_no_format_stores_are_advised_to_leave_the_other_scheme_out(mix: dict, tiny, tmp_path: Path) -> None:
    asked = {"method": "rtn", **mix}
    with pytest.raises(UserError, match="does not store") as caught:
        moetools.quantize(tiny("qwen3_moe"), tmp_path / "out", **asked)
    assert "leave `attention` and `embeddings` out" in caught.value.hint
    left = {name: value for name, value in asked.items() if name not in ("attention", "embeddings")}
    moetools.quantize(tiny("qwen3_moe"), tmp_path / "out", **left, dry_run=True)


def test_what_is_advised_to_be_expanded_can_be(tiny, tmp_path: Path) -> None:
    """From a model with all experts in one tensor: packed as the hint says, then made plain as the hint says."""
    with pytest.raises(UserError, match="all experts in one tensor") as caught:
        moetools.quantize(tiny("gpt_oss"), tmp_path / "out", method="rtn")
    assert "`moetools.quantize('PACKED', 'PLAIN', expand=True)`" in caught.value.hint
    moetools.quantize(tiny("gpt_oss"), tmp_path / "PACKED", method="rtn", **advised(caught.value.hint), verify=False)
    moetools.quantize(tmp_path / "PACKED", tmp_path / "PLAIN", expand=True)
    assert "quantization_config" not in read_json_object(tmp_path / "PLAIN" / "config.json")
    with pytest.raises(UserError, match="packs them"):
        moetools.quantize(tmp_path / "PACKED", tmp_path / "again", expand=True, scheme="w8a16")


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "glm4_moe", "phimoe", "flex_olmo"])
@pytest.mark.parametrize("target", [0, 1, 2, 5, 9])
def test_every_target_that_is_called_legal_is(family: str, target: int, tiny) -> None:
    config = read_json_object(tiny(family) / "config.json")
    arch = find_architecture(config)
    try:
        arch.check_expert_count(config, target)
    except UserError as error:
        low, other, *_ = (int(number) for number in re.findall(r"\d+", error.hint.partition(";")[0]))
        for count in (low, other, *([1] if "merge to 1" in error.hint else [])):
            arch.check_expert_count(config, count)
        assert low > 1


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen2_moe"])
def test_the_ratio_that_removes_something_does(family: str, tiny) -> None:
    config = read_json_object(tiny(family) / "config.json")
    arch = find_architecture(config)
    with pytest.raises(UserError, match="removes none") as caught:
        resolve_target(None, 0.02, arch, config, "keep")
    assert resolve_target(None, float(advised(caught.value.hint)["ratio"]), arch, config, "keep") < 8


def test_a_dense_student_is_quantized(tiny, ids: str, tmp_path: Path) -> None:
    moetools.distill(tiny("qwen3_moe"), tmp_path / "student", data=[ids], seq_len=16, local_steps=0)
    moetools.quantize(tmp_path / "student", tmp_path / "int4", scheme="w4a16", method="rtn")
    config = read_json_object(tmp_path / "int4" / "config.json")
    assert [group["weights"]["num_bits"] for group in config["quantization_config"]["config_groups"].values()] == [4]


def test_a_format_that_is_not_read_is_not_listed_as_read(rewrite, tiny, tmp_path: Path) -> None:
    model = rewrite(tiny("qwen3_moe"), config={"quantization_config": {"quant_method": "hqq", "bits": 4}})
    with pytest.raises(MoetoolsError, match=r"'hqq', which is not read here; read are (?!.*hqq)") as caught:
        moetools.quantize(model, tmp_path / "out", method="rtn")
    assert "unquantized" in caught.value.hint


def test_a_window_in_every_layer_reaches_the_student(tiny, ids: str, tmp_path: Path) -> None:
    """Verified against the teacher's own layers: 16 tokens through windows of 4."""
    teacher = tiny("qwen3_moe", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    moetools.distill(teacher, tmp_path / "student", data=[ids], seq_len=16, local_steps=0)
    config = read_json_object(tmp_path / "student" / "config.json")
    assert config["layer_types"] == ["sliding_attention"] * 3
