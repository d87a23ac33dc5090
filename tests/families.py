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
