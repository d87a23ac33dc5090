"""gpt-oss: top-k of the logits, then softmax over those; experts transposed, interleaved and with biases."""

from collections.abc import Mapping
from typing import Any

from moetools.architectures.base import Architecture
from moetools.architectures.gguf_family import GgufFamily
from moetools.architectures.mlx_family import MlxFamily
from moetools.architectures.pieces import Piece, Rows

_EXPERTS = r"model\.layers\.(\d+)\.mlp\.experts\."


def _problem(config: Mapping[str, Any]) -> str | None:
    kinds = config.get("layer_types") or []
    if any((kind == "sliding_attention") != (layer % 2 == 0) for layer, kind in enumerate(kinds)):
        return "has sliding windows in layers 0, 2, 4 and so on, and in no others"
    return None


def _mlx_problem(config: Mapping[str, Any]) -> str | None:
    kinds = set(config.get("layer_types") or ["sliding_attention", "full_attention"])
    if kinds != {"sliding_attention", "full_attention"}:
        return "needs layers with and without sliding windows"
    return None


def _mlx_piece(leaf: str, projection: str, rows: Rows) -> Piece:
    """One of the tensors that hold all experts: `gate_up_proj` and its bias have gate and up in turns."""
    weight = leaf.endswith("proj")
    name = f"model.layers.{{layer}}.mlp.experts.{projection}_proj.{'weight' if weight else 'bias'}"
    return Piece(tensor=_EXPERTS + leaf, name=name, rows=rows, transposed=weight)


ARCHITECTURE = Architecture(
    model_type="gpt_oss",
    router="router",
    router_bias="router.bias",
    scoring="topk_softmax",
    count_keys=("num_local_experts", "num_experts"),
    top_k_keys=("num_experts_per_tok", "experts_per_token"),
    width_keys=("intermediate_size",),
    mlx=MlxFamily(
        dense_layers=False,
        own_head=True,
        window=True,
        problem=_mlx_problem,
        pieces=(
            _mlx_piece("gate_up_proj", "gate", "even"),
            _mlx_piece("gate_up_proj", "up", "odd"),
            _mlx_piece("down_proj", "down", "all"),
            _mlx_piece("gate_up_proj_bias", "gate", "even"),
            _mlx_piece("gate_up_proj_bias", "up", "odd"),
            _mlx_piece("down_proj_bias", "down", "all"),
        ),
    ),
    gguf=GgufFamily(
        name="gpt-oss",
        own_head=True,
        window=True,
        yarn=True,
        fields={
            "intermediate_size": "add_expert_feed_forward_length",
            "sliding_window": "add_sliding_window",
        },
        problem=_problem,
        pieces=(
            Piece(
                tensor=_EXPERTS + "gate_up_proj",
                name="blk.{layer}.ffn_gate_exps.weight",
                rows="even",
                transposed=True,
            ),
            Piece(tensor=_EXPERTS + "gate_up_proj", name="blk.{layer}.ffn_up_exps.weight", rows="odd", transposed=True),
            Piece(tensor=_EXPERTS + "down_proj", name="blk.{layer}.ffn_down_exps.weight", transposed=True),
            Piece(tensor=_EXPERTS + "gate_up_proj_bias", name="blk.{layer}.ffn_gate_exps.bias", rows="even"),
            Piece(tensor=_EXPERTS + "gate_up_proj_bias", name="blk.{layer}.ffn_up_exps.bias", rows="odd"),
            Piece(tensor=_EXPERTS + "down_proj_bias", name="blk.{layer}.ffn_down_exps.bias"),
            Piece(tensor=r"model\.layers\.(\d+)\.self_attn\.sinks", name="blk.{layer}.attn_sinks.weight"),
        ),
    ),
)
