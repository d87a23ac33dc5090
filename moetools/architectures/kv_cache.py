"""How much keys and values of past tokens take while a model generates."""

from collections.abc import Mapping
from typing import Any

_BYTES = 2


def kv_cache_bytes(config: Mapping[str, Any], layers: int, tokens: int) -> int | None:
    """Bytes of the cache of one sequence of `tokens` tokens in 16 bits.

    Per layer and token 2 * kv_heads * head_dim numbers; with MLA kv_lora_rank + qk_rope_head_dim, which vLLM reaches
    (DeepSeek-V2, arXiv 2405.04434, section 2.1). Layers whose kind says `sliding` keep at most `sliding_window` tokens,
    and so do all where the config names a window and no kinds; linear attention keeps none (its state is small and does
    not grow).

    Args:
        config: the text model's part of config.json.

    Returns:
        None where the config does not say.
    """
    latent = config.get("kv_lora_rank")
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    head_dim = config.get("head_dim") or (hidden // heads if heads and hidden else None)
    kv_heads = config.get("num_key_value_heads") or heads
    if latent:
        each = latent + (config.get("qk_rope_head_dim") or 0)
    elif kv_heads and head_dim:
        each = 2 * kv_heads * head_dim
    else:
        return None
    return _BYTES * each * sum(_kept(config, layer, tokens) for layer in range(layers))


def _kept(config: Mapping[str, Any], layer: int, tokens: int) -> int:
    """Tokens that a layer keeps."""
    kinds, window = config.get("layer_types") or [], config.get("sliding_window")
    kind = kinds[layer] if layer < len(kinds) else ""
    if "linear" in kind:
        return 0
    windowed = "sliding" in kind if kind else config.get("use_sliding_window", True)
    return min(tokens, window) if window and windowed else tokens
