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


def advised(hint: str | None) -> dict[str, Any]:
    """The options of the first alternative that a hint names, as arguments."""
    parts = [re.findall(r"`(\w+)=([^`]+)`", part) for part in re.split("[;,]", hint or "")]
    return {name: int(value) if value.isdigit() else value for name, value in next(filter(None, parts), [])}


@pytest.mark.parametrize(
    ("family", "wrong", "right"),
    [
        ("qwen3_moe", {"scheme": "w4a16", "group_size": 7}, {}),
        ("qwen3_moe", {"scheme": "fp8-block"}, {}),
        ("qwen3_moe", {"scheme": "w8a8"}, {}),
        ("gpt_oss", {"scheme": "w4a16", "format": "compressed-tensors"}, {}),
        ("mixtral", {"scheme": "w4a16", "format": "compressed-tensors", "embeddings": "w4a16"}, {}),
        ("qwen3_moe", {"scheme": "w4a16", "asymmetric": True}, {}),
        ("qwen3_moe", {"scheme": "w4a16", "method": "gptq"}, {}),
    ],
)
def test_what_quantize_advises(family: str, wrong: dict, right: dict, tiny, tmp_path: Path) -> None:
    asked = {"method": "rtn", **wrong}
    with pytest.raises(UserError) as caught:
        moetools.quantize(tiny(family), tmp_path / "out", **asked)
    assert advised(caught.value.hint), caught.value
    moetools.quantize(tiny(family), tmp_path / "out", **{**asked, **advised(caught.value.hint), **right}, dry_run=True)


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
