"""Folders for MLX hold what was meant: words against a loop over bits, logits of mlx-lm against stock transformers."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from families import FAMILIES as TINY
from mtp_models import QWEN3_NEXT
from packing import among, write_packed
from safetensors.torch import load_file, save_file

import moetools
from moetools.errors import UnsupportedModelError, UserError, VerificationError
from moetools.formats import mlx_entries
from moetools.formats.base import load_format
from moetools.formats.mlx import check_mlx, export_mlx, read_mlx
from moetools.formats.reader import open_model
from moetools.grids.base import make_grid

WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {},
    "olmoe": {},
    "deepseek_v3": {"kv_lora_rank": 32, "q_lora_rank": 32},
    "glm4_moe": {},
    "dots1": {},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "gpt_oss": {"head_dim": 16, "sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "granitemoe": {
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
    },
    "ernie4_5_moe": {},
    "minimax_m2": {"head_dim": 16},
    "qwen3_next": {"num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
FUSED = ("gpt_oss", "granitemoe")
MLX = os.environ.get("MOETOOLS_MLX_PYTHON", "")
"""A Python with mlx and mlx-lm, in an environment of its own; what needs them skips itself without it."""
_RUN = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
logits = model(mx.array([json.loads(sys.argv[2])]))
print(json.dumps(logits[0].astype(mx.float32).tolist()))
"""
needs_mlx = pytest.mark.skipif(not MLX, reason="no mlx-lm; set MOETOOLS_MLX_PYTHON")


def integer(bits: int, group: int = 32, **more: Any) -> Any:
    return make_grid({"kind": "integer", "bits": bits, "group_size": group, **more})


@pytest.fixture
def model(tiny) -> Path:
    return tiny("qwen3_moe", dtype=torch.float32, **WIDE)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_words_hold_the_bits_of_all_codes_one_after_the_other(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (3, 64), generator=generator, dtype=torch.uint8)
    words = mlx_entries.words_of(codes, bits)
    assert (words.dtype, tuple(words.shape)) == (torch.uint32, (3, 2 * bits))
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        stream = sum(word << (32 * place) for place, word in enumerate(packed))
        assert [(stream >> (bits * place)) & ((1 << bits) - 1) for place in range(64)] == row
    assert torch.equal(mlx_entries.codes_of(words, bits), codes)


def test_values_are_those_of_the_grids_whatever_the_mix(model: Path, tmp_path: Path) -> None:
    """Experts of several widths and groups share a tensor; the widest and the finest holds them all."""
    grids = {"0": integer(2, 64), "1": integer(3, 32), "2": integer(7, 64), "3": integer(2, 64, ternary=True)}

    def choose(name: str) -> Any:
        if ".experts." in name:
            return grids.get(name.split(".experts.")[1].split(".")[0], integer(4, 64))
        return integer(6, 0) if "q_proj" in name else None

    packed, _ = write_packed(model, tmp_path / "packed", load_format("moetools"), choose)
    source = open_model(packed)
    kinds = export_mlx(source, tmp_path / "mlx")
    assert kinds["model.layers.0.mlp.switch_mlp.up_proj"] == "8 bits in groups of 32"
    assert kinds["model.layers.0.self_attn.q_proj"] == "6 bits in groups of 64"
    found = dict(read_mlx(tmp_path / "mlx"))
    for expert in range(8):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        meant = source.quantized(name).dequantize()[0]
        assert torch.equal(found["model.layers.1.mlp.switch_mlp.down_proj"][expert], meant)
    router = load_file(model / "model.safetensors")["model.layers.0.mlp.gate.weight"]
    assert torch.equal(found["model.layers.0.mlp.gate"], router)
    config = json.loads((tmp_path / "mlx/config.json").read_text())
    assert "quantization_config" not in config
    assert config["quantization"]["model.layers.0.self_attn.q_proj"] == {
        "group_size": 64,
        "bits": 6,
        "mode": "affine",
    }


def test_the_config_has_the_spellings_that_mlx_lm_reads(model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model, tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    for key in ("rope_theta", "tie_word_embeddings", "num_experts"):
        config.pop(key, None)
    (source / "config.json").write_text(json.dumps({**config, "num_local_experts": 8}))
    export_mlx(open_model(source), tmp_path / "mlx")
    written = json.loads((tmp_path / "mlx/config.json").read_text())
    assert (written["num_experts"], written["rope_theta"], written["partial_rotary_factor"]) == (8, 5e5, 0.5)
    assert written["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "type": "yarn"}
    assert written["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (integer(4, 32, symmetric=False), "no form for"),
        (integer(4, 16), "groups are 32, 64 or 128 columns"),
        (make_grid({"kind": "float8"}), "no form for"),
        (make_grid({"kind": "nvfp4"}), "no form for"),
    ],
)
def test_grids_that_mlx_has_not_are_refused(grid: Any, said: str, model: Path) -> None:
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    with pytest.raises(UserError, match=said) as caught:
        check_mlx(open_model(model), {name: grid})
    assert caught.value.hint


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("gpt_oss", {"layer_types": ["sliding_attention"] * 3}, "with and without sliding windows"),
        ("qwen2_moe", {"norm_topk_prob": True, "mlp_only_layers": []}, "norm_topk_prob False"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "experts in every layer"),
        ("qwen3_moe", {"attention_bias": True}, "has no `attention_bias`"),
        ("phimoe", {}, "takes `attention_bias` for granted"),
        ("mixtral", {"sliding_window": 4}, "no sliding window"),
        ("ernie4_5_moe", {}, "e_score_correction_bias' out, which is not zero"),
    ],
)
def test_models_that_mlx_lm_computes_otherwise_are_refused(family: str, options: dict, said: str, tiny) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        check_mlx(open_model(tiny(family, **options)), {})


def test_a_file_that_is_not_what_was_meant_is_found(model: Path, tmp_path: Path, monkeypatch) -> None:
    words_of = mlx_entries.words_of
    monkeypatch.setattr(mlx_entries, "words_of", lambda codes, bits: words_of(codes.flip(0), bits))
    packed, _ = write_packed(model, tmp_path / "packed", load_format("moetools"), among((".experts.",), integer(4)))
    with pytest.raises(VerificationError, match=r"switch_mlp\..* is not what was meant"):
        export_mlx(open_model(packed), tmp_path / "mlx")


def test_a_checkpoint_has_the_folder_beside_its_files_and_does_not_hand_it_on(model: Path, tmp_path: Path) -> None:
    out, same = tmp_path / "out", {"device": "cpu", "verify": False}
    moetools.quantize(model, out, method="rtn", scheme="w4a16", group_size=32, format="mlx", **same)
    found = dict(read_mlx(out / "mlx"))
    name = "model.layers.0.mlp.experts.3.gate_proj.weight"
    meant = open_model(out).quantized(name).dequantize()[0]
    assert torch.equal(found["model.layers.0.mlp.switch_mlp.gate_proj"][3], meant)
    moetools.quantize(out, tmp_path / "plain", expand=True, verify=False)
    assert not (tmp_path / "plain/mlx").exists()
    with pytest.raises(UserError, match="groups are 32, 64 or 128"):
        moetools.quantize(model, tmp_path / "no", method="rtn", group_size=16, format="mlx", **same)


def mlx_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits [N, V] of mlx-lm."""
    ran = subprocess.run([MLX, "-c", _RUN, folder, json.dumps(ids)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-1000:]
    return torch.tensor(json.loads(ran.stdout.splitlines()[-1]))


def all_experts(grid: Any) -> Any:
    """Of tensors that hold all experts, whatever their names end with."""
    return lambda name: grid if re.search(r"experts\.(gate_up|down)_proj$|_linear\.weight$", name) else None


def with_biases(source: Path, folder: Path, family: str) -> Path:
    """A copy whose biases, sinks and centred norms, zero in a fresh model, have values, but for what mlx-lm drops."""
    out = shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        fresh = name.endswith(("bias", "sinks")) or (family == "qwen3_next" and "norm" in name)
        if family == "ernie4_5_moe" and "e_score_correction" in name:
            tensors[name] = torch.zeros_like(tensor)
        elif fresh:
            tensors[name] = tensor + 0.2 * torch.rand(tensor.shape, generator=generator)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@needs_mlx
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("grid", [None, {"kind": "mxfp4"}, {"kind": "integer", "bits": 3, "group_size": 32}])
@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_computes_the_same_logits(family: str, grid: Any, tied: bool, tiny, stock, tmp_path: Path) -> None:
    """As stock transformers with the dequantized weights; in F32, where no rounding sends tokens to other experts."""
    options = {**WIDE, **FAMILIES[family], "tie_word_embeddings": tied}
    with patch.dict(TINY, {"qwen3_next": QWEN3_NEXT}):
        source = with_biases(tiny(family, dtype=torch.float32, **options), tmp_path / "source", family)
    meant = shutil.copytree(source, tmp_path / "meant")
    if grid is not None:
        floats = grid["kind"] == "mxfp4"
        made = make_grid(grid if floats else {"scale_dtype": "float32", **grid})
        ends = () if floats else ("embed_tokens", "lm_head")
        layout = load_format("mxfp4" if floats and family not in FUSED else "moetools")
        chosen = all_experts(made) if family in FUSED else among((".experts.", "self_attn.q_proj", *ends), made)
        source, intended = write_packed(source, tmp_path / "packed", layout, chosen, turned=family == "gpt_oss")
        save_file(intended, meant / "model.safetensors", metadata={"format": "pt"})
    export_mlx(open_model(source), tmp_path / "mlx")
    ids = list(range(2, 40))
    found, expected = mlx_logits(tmp_path / "mlx", ids), stock(meant)(torch.tensor([ids])).logits[0].detach()
    # The state of linear attention is summed up in another order, and its keys divided by another epsilon.
    allowed = 3e-4 if family == "qwen3_next" else 2e-5
    assert (found - expected).abs().max() < allowed * expected.abs().max()
