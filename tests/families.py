"""Tiny random checkpoints of every model family, saved by stock transformers in the family's own layout."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
FAMILIES: dict[str, dict] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "intermediate_size": 48,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24, "num_key_value_heads": 4},
    "deepseek_v2": {
        **MLA,
        **GROUPED,
        "topk_method": "group_limited_greedy",
        "num_key_value_heads": 4,
        "norm_topk_prob": False,
    },
    "deepseek_v3": {**MLA, **GROUPED, "num_key_value_heads": 4},
    "glm4_moe": {**GROUPED, "head_dim": 8},
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 24,
        "head_dim": 8,
        "sliding_window": 16,
    },
    "granitemoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 24,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.5,
    },
    "phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24},
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
    },
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24, "head_dim": 8},
    "dots1": {**GROUPED, "head_dim": 8, "layer_types": ["full_attention"] * 3},
    "flex_olmo": {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24, "num_key_value_heads": 4},
}
"""Config of each family beside COMMON; flex_olmo has no file of its own and stands for the generic detector."""

_GEMMA4_MOE = {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "per_layer_config": {"1": {"head_dim": 8}, "3": {"head_dim": 8}},
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
}
_VISION = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8]}
SHRUNK_OVERRIDES: dict[str, dict] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_tok": 2}
    },
    "dots3_note": {
        "text_config": {"head_dim": 16, "swa_head_dim": 16, "per_layer_config": None},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {"head_dim": 16, "swa_head_dim": 16, "per_layer_config": None},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [24, 24],
            "head_dim": 8,
            "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]},
        }
    },
    "gemma4": {"text_config": _GEMMA4_MOE},
    "gemma4_text": _GEMMA4_MOE,
    "glm4v_moe": {"text_config": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0]}, "head_dim": 8}},
    "glm5_next": {"text_config": {"index_kpool": 4, "qk_rope_head_dim": 0, "head_dim": 0}},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "hunyuan_v1_moe": {"head_dim": 8, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mistral4": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "head_dim": 8},
    "muse_spark": {"vision_config": _VISION},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "step3p7": {"text_config": {"sliding_window": 16}},
    "zaya": {"num_experts_per_tok": 1},
}
"""What shrinking a family's defaults (`tiny_configs`) gets wrong."""

ENCODER_DECODERS = frozenset({"nllb_moe", "switch_transformers"})
"""Families with a file whose experts cannot be changed."""

_STATE = "layers hand on more than hidden states"
_OTHER_FORM = "no decoder was found that embeds tokens and has layers"
_OWN_EXPERTS = "no layer runs its experts through transformers' experts interface"
CANNOT_RUN = {
    **dict.fromkeys(("glm_moe_dsa", "hy_v4", "mistral_large4", "zaya"), _STATE),
    "dbrx": _OTHER_FORM,
    "nllb-moe": "can only be inspected",
}
CANNOT_CHANGE = {
    **dict.fromkeys(("doge", "jetmoe", "llama4", "llama4_text", "longcat_flash", "step3p7"), _OWN_EXPERTS),
    **dict.fromkeys(("inkling_text", "inkling_mm_model"), "for twice those"),
    "switch_transformers": "can only be inspected and evaluated",
    "deepseek_v4": "holds whole numbers",
    "ernie4_5_vl_moe": "MoE blocks that differ",
    "zaya": "for twice those",
}
CANNOT_MAKE = ("diffusion_gemma", "dots3_note", "dots3_note_text", "nemo_speechlm", "qwen3_omni_moe")
"""Families that the contract (`families_contract`) finds no tiny model of, and those it is refused for, and why."""


def make_tiny(
    family: str, path: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **overrides: object
) -> Path:
    """Write a random checkpoint of `family`, with a correction bias and router biases that are not zero."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name or name.endswith((".bias", "_bias")):
                tensor.copy_(torch.randn_like(tensor) * 0.1)
            elif tensor.dim() >= 2:
                tensor.copy_(torch.randn_like(tensor) / tensor.shape[-1] ** 0.5)
    model.to(dtype).save_pretrained(path)
    return path


def stock_logits(path: Path, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What stock transformers computes in fp32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
