"""More families in llama.cpp: the logits of stock transformers. Needs MOETOOLS_LLAMA_PYTHON, see test_gguf."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from families import FAMILIES
from mtp_models import QWEN3_NEXT
from packing import among, write_packed
from safetensors.torch import load_file, save_file

pytest.importorskip("gguf")

from test_gguf import llama_scores, needs_llama, with_tokenizer

from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import UnsupportedModelError
from moetools.formats.base import load_format
from moetools.formats.gguf import check_gguf, export_gguf, read_gguf
from moetools.formats.reader import open_model
from moetools.grids.base import make_grid

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LATENT = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "head_dim": 16,
}
PLAIN = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96, "head_dim": 16}
OSS = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "sliding_window": 8}
ALL = {"n_group": 1, "topk_group": 1}
OPTIONS: dict[str, tuple[str, dict]] = {
    "deepseek_v2": ("deepseek_v2", {**LATENT, **ALL, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "deepseek_v3, yarn": (
        "deepseek_v3",
        {**LATENT, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "glm4_moe": ("glm4_moe", PLAIN),
    "glm4_moe, no groups": ("glm4_moe", {**PLAIN, **ALL}),
    "dots1": ("dots1", {**PLAIN, **ALL, "num_key_value_heads": 4}),
    "gpt_oss": ("gpt_oss", {**OSS, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "gpt_oss, yarn": ("gpt_oss", {**OSS, "rope_parameters": {**YARN, "truncate": True}}),
    "granitemoe": (
        "granitemoe",
        {
            "hidden_size": 64,
            "intermediate_size": 32,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
        },
    ),
    "ernie4_5_moe": ("ernie4_5_moe", PLAIN),
    "qwen3_next": (
        "qwen3_next",
        {"hidden_size": 64, "num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    ),
    "qwen3_next, four values per key": (
        "qwen3_next",
        {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_value_heads": 8,
            "partial_rotary_factor": 0.5,
        },
    ),
    "minimax_m2": ("minimax_m2", {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16}),
}


def exact(source: Path, folder: Path) -> Path:
    """A copy in F32: llama.cpp rounds the activations in front of BF16 weights, which may reroute tokens.

    Biases that a fresh model has at zero get values, so that losing one is seen.
    """
    out = with_tokenizer(source, folder)
    tensors = {name: tensor.float() for name, tensor in load_file(out / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(("bias", "sinks")):
            tensors[name] = torch.rand(tensor.shape, generator=generator) * 0.2
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@needs_llama
@pytest.mark.parametrize("case", OPTIONS)
def test_llama_cpp_computes_the_logits_of_transformers(case: str, tiny, stock, tmp_path: Path) -> None:
    family, options = OPTIONS[case]
    with patch.dict(FAMILIES, {"qwen3_next": QWEN3_NEXT}):
        source = exact(tiny(family, **options), tmp_path / "model")
    export_gguf(open_model(source), tmp_path / "out.gguf")
    ids = list(range(2, 34))
    found = llama_scores(tmp_path / "out.gguf", ids)
    expected = stock(source)(torch.tensor([ids])).logits[0].detach()
    assert (found - expected.log_softmax(-1)).abs().max() < 0.01 * expected.std()


@needs_llama
@pytest.mark.parametrize("bits", [4, 8])
def test_minimax_differs_by_rounded_activations_alone(bits: int, tiny, stock, tmp_path: Path) -> None:
    """Where 8-bit activations choose other experts a tiny random MiniMax-M2 is off by 14 %. With all experts in use it
    is off by 1 %, in four bits as in eight, and not at all with the same weights in F32.
    """
    options = {"hidden_size": 128, "intermediate_size": 64, "num_experts_per_tok": 8}
    source = exact(tiny("minimax_m2", **options), tmp_path / "model")
    grid = make_grid({"kind": "integer", "bits": bits, "group_size": 32, "scale_dtype": "float16"})
    chosen = among((".experts.", "_proj"), grid)
    packed, intended = write_packed(source, tmp_path / "packed", load_format("moetools"), chosen)
    export_gguf(open_model(packed), tmp_path / "codes.gguf")
    save_file(intended, source / "model.safetensors", metadata={"format": "pt"})
    export_gguf(open_model(source), tmp_path / "exact.gguf")
    ids = list(range(2, 34))
    expected = stock(source)(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    assert (llama_scores(tmp_path / "exact.gguf", ids) - expected).abs().max() < 0.001 * expected.std()
    off = (llama_scores(tmp_path / "codes.gguf", ids) - expected).abs()
    assert off.mean() < 0.015 * expected.std()
    assert off.max() < 0.1 * expected.std()


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "deepseek_v3"])
def test_codes_of_fused_and_split_tensors(family: str, tiny, tmp_path: Path) -> None:
    """Every row is where llama.cpp looks for it, cut out of the stock values by plain indexing."""
    source = with_tokenizer(tiny(family, **OPTIONS[family][1]), tmp_path / "model")
    grid = make_grid({"kind": "integer", "bits": 4, "group_size": 32, "scale_dtype": "float16"})
    parts = ("gate_up_proj", "experts.down_proj", "input_linear", "output_linear", "kv_b_proj", "gate_proj")
    chosen = among(parts, grid)
    packed, intended = write_packed(source, tmp_path / "packed", load_format("moetools"), chosen)
    export_gguf(open_model(packed), tmp_path / "out.gguf")
    found = {name: torch.tensor(values).bfloat16() for name, _, values in read_gguf(tmp_path / "out.gguf")}
    layer = "model.layers.1."
    if family == "gpt_oss":
        fused = intended[layer + "mlp.experts.gate_up_proj"].mT
        gate, up = fused[:, ::2], fused[:, 1::2]
    elif family == "granitemoe":
        gate, up = intended[layer + "block_sparse_moe.input_linear.weight"].chunk(2, dim=1)
    else:
        gate, up = (
            torch.stack([intended[f"{layer}mlp.experts.{expert}.{role}_proj.weight"] for expert in range(8)])
            for role in ("gate", "up")
        )
        heads = intended[layer + "self_attn.kv_b_proj.weight"].view(4, 48, 32)
        assert torch.equal(found["blk.1.attn_k_b.weight"], heads[:, :16].mT)
        assert torch.equal(found["blk.1.attn_v_b.weight"], heads[:, 16:])
    assert torch.equal(found["blk.1.ffn_gate_exps.weight"], gate)
    assert torch.equal(found["blk.1.ffn_up_exps.weight"], up)


def test_what_llama_cpp_computes_otherwise_is_refused(tiny, tmp_path: Path) -> None:
    def why(family: str, **config: object) -> str:
        source = with_tokenizer(tiny(family, **OPTIONS[family][1]), tmp_path / str(len(list(tmp_path.iterdir()))))
        changed = json.loads((source / "config.json").read_text()) | config
        (source / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UnsupportedModelError) as caught:
            check_gguf(open_checkpoint(source), {})
        return caught.value.message

    groups = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
    assert "best two experts" in why("deepseek_v2", **groups)
    assert "expects a q_lora_rank" in why("deepseek_v3", q_lora_rank=None)
    assert "sliding windows in layers 0, 2" in why("gpt_oss", layer_types=["full_attention"] * 3)
    assert "not every 2" in why("ernie4_5_moe", moe_layer_interval=2)
    assert "key-value heads" in why("dots1", num_key_value_heads=2)
