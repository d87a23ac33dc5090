"""Bytes of keys and values by what config.json says."""

import pytest

from moetools.architectures.kv_cache import kv_cache_bytes

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
KINDS = ["full_attention", "sliding_attention", "linear_attention"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (HEADS, 3 * 100 * 2 * 2 * 8),
        ({**HEADS, "head_dim": 16}, 3 * 100 * 2 * 2 * 16),
        ({**HEADS, "kv_lora_rank": 32, "qk_rope_head_dim": 4}, 3 * 100 * 36),
        ({**HEADS, "layer_types": KINDS, "sliding_window": 10}, 110 * 2 * 2 * 8),
        ({**HEADS, "sliding_window": 10}, 3 * 10 * 2 * 2 * 8),
        ({**HEADS, "sliding_window": 10, "use_sliding_window": False}, 3 * 100 * 2 * 2 * 8),
        ({"num_attention_heads": 8}, None),
    ],
)
def test_bytes_of_a_sequence(config: dict, expected: int | None) -> None:
    assert kv_cache_bytes(config, 3, 100) == (None if expected is None else 2 * expected)
