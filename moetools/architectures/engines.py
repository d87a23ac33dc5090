"""How engines have families that need no description of their own here, because what they have is discovered."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moetools.architectures.gguf_family import GgufFamily
from moetools.architectures.mlx_family import MlxFamily
from moetools.architectures.pieces import Piece

_LINEAR = r"model\.layers\.(\d+)\.linear_attn\."
_CENTRED = r"(?:input_layernorm|post_attention_layernorm|self_attn\.[qk]_norm)"


def _interval(config: Mapping[str, Any]) -> int | None:
    """Every how many layers attention is full; None where that is not regular."""
    kinds = config.get("layer_types") or []
    full = [layer + 1 for layer, kind in enumerate(kinds) if kind == "full_attention"]
    interval = full[0] if full else len(kinds) + 1
    return interval if full == list(range(interval, len(kinds) + 1, interval)) else None


def _qwen3_next_problem(config: Mapping[str, Any]) -> str | None:
    if _interval(config) is None:
        return "has full attention at regular intervals, config.json's layer_types does not"
    if config["linear_key_head_dim"] != config["linear_value_head_dim"]:
        return "has linear attention with keys and values of one width"
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return "has experts in every layer"
    return "has no biases in the attention" if config.get("attention_bias") else None


def _qwen3_next_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["linear_num_value_heads"]
    return {
        "add_ssm_inner_size": heads * config["linear_value_head_dim"],
        "add_full_attention_interval": _interval(config),
    }


def _mixed_rows(config: Mapping[str, Any], *, gates: bool) -> Tensor:
    """Rows of `in_proj_qkvz`, which has queries, keys, values and gates by heads of the keys: a kind together.

    Args:
        gates: those of the gates, else of queries, keys and values.
    """
    heads, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    wide = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]
    rows = torch.arange(heads * (2 * size + 2 * wide)).view(heads, -1)
    query, key, value, gate = rows.split([size, size, wide, wide], dim=1)
    return gate.reshape(-1) if gates else torch.cat([one.reshape(-1) for one in (query, key, value)])


def _plus_one(value: Tensor) -> Tensor:
    return value.float() + 1


_CENTRED_NORMS = ((r"model\.norm\.weight", _plus_one), (rf"model\.layers\.\d+\.{_CENTRED}\.weight", _plus_one))

ENGINES: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "gguf": GgufFamily(
            name="qwen3next",
            normalised=True,
            own_head=True,
            fields={
                "moe_intermediate_size": "add_expert_feed_forward_length",
                "shared_expert_intermediate_size": "add_expert_shared_feed_forward_length",
                "linear_conv_kernel_dim": "add_ssm_conv_kernel",
                "linear_key_head_dim": "add_ssm_state_size",
                "linear_num_key_heads": "add_ssm_group_count",
                "linear_num_value_heads": "add_ssm_time_step_rank",
            },
            computed=_qwen3_next_fields,
            problem=_qwen3_next_problem,
            pieces=(
                Piece(
                    tensor=_LINEAR + r"in_proj_qkvz\.weight",
                    name="blk.{layer}.attn_qkv.weight",
                    order=lambda config: _mixed_rows(config, gates=False),
                ),
                Piece(
                    tensor=_LINEAR + r"in_proj_qkvz\.weight",
                    name="blk.{layer}.attn_gate.weight",
                    order=lambda config: _mixed_rows(config, gates=True),
                ),
                Piece(
                    tensor=_LINEAR + "A_log", name="blk.{layer}.ssm_a", value=lambda value: -torch.exp(value.float())
                ),
                Piece(tensor=_LINEAR + "dt_bias", name="blk.{layer}.ssm_dt.bias"),
                Piece(
                    tensor=_LINEAR + r"conv1d\.weight",
                    name="blk.{layer}.ssm_conv1d.weight",
                    value=lambda value: value.float().squeeze(1),
                ),
            ),
            changed=_CENTRED_NORMS,
        ),
        "mlx": MlxFamily(
            problem=_qwen3_next_problem,
            changed=(*_CENTRED_NORMS, (_LINEAR + r"conv1d\.weight", lambda value: value.mT)),
        ),
    }
}
"""`Architecture.gguf` and `mlx` by model type."""
