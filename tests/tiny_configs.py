"""Tiny configs of every MoE family of the installed transformers, shrunk from each family's own defaults."""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

LAYERS = 4
VOCABULARY = 128
CLASSES = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
)
COUNT = re.compile(r"^(moe_)?(num|n)_(local_|routed_)?experts$|^moe_num_experts$")

SIZES: tuple[tuple[str, int], ...] = (
    (r"^vocab_size$|vocab_size_per_layer_input", VOCABULARY),
    (COUNT.pattern, 8),
    (r"^num_experts_per_tok(en)?$|^moe_(topk|k|top_k)$|^top_k_experts$|^moe_router_topk$", 2),
    (r"^(n_group|num_expert_group|topk_group|n_expert_groups|moe_n_group)$", 2),
    (r"(n|num)_shared_experts$", 1),
    (r"^(num_hidden_layers|n_layers|num_layers|num_decoder_layers|encoder_layers|decoder_layers|depth)$", LAYERS),
    (r"^(num_attention_heads|n_heads|num_heads|encoder_attention_heads|decoder_attention_heads)$", 4),
    (r"^(num_key_value_heads|num_global_key_value_heads|kv_n_heads|swa_num_key_value_heads)$", 2),
    (r"^(head_dim|global_head_dim|qk_rope_head_dim|qk_nope_head_dim|v_head_dim|index_head_dim|linear_.*_head_dim)$", 8),
    (r"^qk_head_dim$", 16),
    (r"^index_n_heads$|^linear_num_.*_heads$|^index_topk_heads$", 4),
    (r"^(q|kv|o|qk|v)_lora_rank$", 16),
    (r"^index_topk$", 8),
    (r"^(hidden_size|d_model|n_embd|embed_dim|out_hidden_size|hidden_dim|text_hidden_size)$", 32),
    (r"(intermediate_size|ffn_hidden_size|d_ff|ffn_dim|intermediate_dim|expert_dim|mlp_dim)", 24),
    (r"^max_position_embeddings$|^max_seq_len$|^n_positions$", 256),
    (r"^sliding_window.*$|^attention_chunk_size$", 16),
    (r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index|first_dense_layers)$", 1),
    (r"^num_kv_shared_layers$|^num_nextn_predict_layers$|^num_mtp_modules$", 0),
)


def families() -> dict[str, str]:
    """model_type -> class that generates text, for every family whose config counts experts somewhere."""
    found = {}
    for model_type in CONFIG_MAPPING:
        name = next(
            (
                getattr(modeling_auto, key).get(model_type)
                for key in CLASSES
                if getattr(modeling_auto, key).get(model_type)
            ),
            None,
        )
        if name is None:
            continue
        name = name if isinstance(name, str) else name[0]
        try:
            config = CONFIG_MAPPING[model_type]().to_dict()
        except (ValueError, TypeError, AttributeError, StrictDataclassError):
            continue
        if _counts_experts(config):
            found[model_type] = name
    return dict(sorted(found.items()))


def _counts_experts(config: Mapping[str, Any]) -> bool:
    for key, value in config.items():
        if isinstance(value, Mapping) and re.search("text|thinker|ffn|decoder", str(key)) and _counts_experts(value):
            return True
        if COUNT.search(str(key)) or key == "enable_moe_block":
            return True
    return False


def shrunk(config: Any, layers: int | None = None) -> Any:
    """A config dict with every size made small, nested ones too."""
    stated = next(
        (config[k] for k in ("num_hidden_layers", "num_layers", "n_layers") if isinstance(config.get(k), int)), None
    )
    result = {}
    for key, value in config.items():
        key = str(key)
        if key == "per_layer_config":
            result[key] = _first_layers(value)
        elif isinstance(value, Mapping) and key not in ("rope_parameters", "rope_scaling", "id2label", "label2id"):
            result[key] = shrunk(value)
        elif isinstance(value, list) and stated and len(value) == stated:
            result[key] = _pattern(value, LAYERS)
        elif isinstance(value, bool) or not isinstance(value, int):
            result[key] = value
        elif key.endswith("token_id") or key.endswith("token_index") or key in ("image_token", "video_token"):
            result[key] = value if value < 8 else 3 + sum(map(ord, key)) % (VOCABULARY - 10)
        else:
            result[key] = next((small for pattern, small in SIZES if re.search(pattern, key) and value), value)
    if result.get("kv_lora_rank"):
        result["num_key_value_heads"] = result["num_attention_heads"]
    return result


def _first_layers(values: Any) -> Any:
    """Settings of single layers: those of the first two that have any, moved to layers 1 and 2."""
    return {str(number + 1): shrunk(value) for number, value in enumerate(list((values or {}).values())[:1])} or values


def _pattern(values: list, count: int) -> list:
    """`count` of a per-layer list's values, every distinct one among them, in the order they appear."""
    distinct = list(dict.fromkeys(map(str, values)))
    chosen = [values[[str(v) for v in values].index(name)] for name in distinct][:count]
    while len(chosen) < count:
        chosen.append(values[len(chosen) - 1] if len(distinct) == 1 else chosen[len(chosen) % len(distinct)])
    return chosen


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return result
