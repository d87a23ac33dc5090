"""gpt-oss: top-k of the logits, then softmax over those; experts transposed, interleaved and with biases."""

from collections.abc import Mapping
from typing import Any

from moetools.architectures.base import Architecture
from moetools.architectures.gguf_family import GgufFamily, GgufPiece

_EXPERTS = r"model\.layers\.(\d+)\.mlp\.experts\."


def _problem(config: Mapping[str, Any]) -> str | None:
    kinds = config.get("layer_types") or []
    if any((kind == "sliding_attention") != (layer % 2 == 0) for layer, kind in enumerate(kinds)):
        return "has sliding windows in layers 0, 2, 4 and so on, and in no others"
    return None


ARCHITECTURE = Architecture(
    model_type="gpt_oss",
    router="router",
    router_bias="router.bias",
    scoring="topk_softmax",
    count_keys=("num_local_experts", "num_experts"),
    top_k_keys=("num_experts_per_tok", "experts_per_token"),
    width_keys=("intermediate_size",),
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
            GgufPiece(
                tensor=_EXPERTS + "gate_up_proj",
                name="blk.{layer}.ffn_gate_exps.weight",
                rows="even",
                transposed=True,
            ),
            GgufPiece(
                tensor=_EXPERTS + "gate_up_proj", name="blk.{layer}.ffn_up_exps.weight", rows="odd", transposed=True
            ),
            GgufPiece(tensor=_EXPERTS + "down_proj", name="blk.{layer}.ffn_down_exps.weight", transposed=True),
            GgufPiece(tensor=_EXPERTS + "gate_up_proj_bias", name="blk.{layer}.ffn_gate_exps.bias", rows="even"),
            GgufPiece(tensor=_EXPERTS + "gate_up_proj_bias", name="blk.{layer}.ffn_up_exps.bias", rows="odd"),
            GgufPiece(tensor=_EXPERTS + "down_proj_bias", name="blk.{layer}.ffn_down_exps.bias"),
            GgufPiece(tensor=r"model\.layers\.(\d+)\.self_attn\.sinks", name="blk.{layer}.attn_sinks.weight"),
        ),
    ),
)
