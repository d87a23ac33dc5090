"""How a Mixture-of-Experts family is called and computed in llama.cpp."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moetools.architectures.pieces import Change, Piece


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """What a GGUF file of the family says, and what llama.cpp takes for granted about it.

    Attributes:
        name: the architecture in llama.cpp.
        normalised: whether llama.cpp makes the weights of the chosen experts sum to one; config.json must say the same
            of `norm_topk_prob`. None where it reads that key, or transformers has no choice either.
        own_head: the output matrix has to be in the file even where it is the embeddings.
        neighbours: rotary positions turn neighbouring pairs of rows, where transformers turns halves.
        all_heads: only models with as many key-value heads as heads are loaded.
        dense_layers: whether the first layers may have a dense FFN.
        window: whether it has sliding windows.
        yarn: whether rotary positions may be stretched by YaRN.
        fields: config key -> the method of gguf's writer that takes its value, where config.json has one.
        computed: config.json -> what else the file says, by the writer's method; it overrides what is common to all.
        problem: config.json -> why llama.cpp would compute something else; None where it would not.
        pieces: tensors that are parts of those on disk, beside the experts that lie apart on disk.
        changed: patterns of whole names on disk, and what becomes of those vectors.
    """

    name: str
    normalised: bool | None = None
    own_head: bool = False
    neighbours: bool = False
    all_heads: bool = False
    dense_layers: bool = False
    window: bool = False
    yarn: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    computed: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    problem: Callable[[Mapping[str, Any]], str | None] | None = None
    pieces: tuple[Piece, ...] = ()
    changed: tuple[tuple[str, Change], ...] = ()


SIGMOID, SOFTMAX = 2, 1
"""llama.cpp's numbers of the scoring functions (`expert_gating_func`)."""
GROUPED_ROUTER = {
    "moe_intermediate_size": "add_expert_feed_forward_length",
    "n_shared_experts": "add_expert_shared_count",
    "routed_scaling_factor": "add_expert_weights_scale",
    "norm_topk_prob": "add_expert_weights_norm",
}
"""Fields of the families that share DeepSeek-V3's router."""


def grouped(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of group-limited routing by sigmoid scores; llama.cpp asserts that some groups are left out."""
    groups, used = config.get("n_group") or 1, config.get("topk_group") or 1
    limited = {"add_expert_group_count": groups, "add_expert_group_used_count": used} if used < groups else {}
    return {"add_expert_gating_func": SIGMOID, **limited}


def latent_attention(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of multi-head latent attention, which llama.cpp computes as one key-value head of the latent's width."""
    rank, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaled = rope.get("mscale_all_dim")
    return {
        "add_head_count_kv": 1,
        "add_kv_lora_rank": rank,
        "add_key_length": rank + rotary,
        "add_value_length": rank,
        "add_key_length_mla": config["qk_nope_head_dim"] + rotary,
        "add_value_length_mla": config["v_head_dim"],
        "add_rope_dimension_count": rotary,
        **({"add_q_lora_rank": config["q_lora_rank"]} if config.get("q_lora_rank") else {}),
        **({"add_rope_scaling_yarn_log_mul": 0.1 * scaled} if scaled else {}),
    }


def latent_problem(config: Mapping[str, Any]) -> str | None:
    """llama.cpp tells by the number of layers whether the queries have a latent, too."""
    lite = config["num_hidden_layers"] in (26, 27) or (
        config["num_hidden_layers"] == 48 and config["vocab_size"] == 128256
    )
    if lite == bool(config.get("q_lora_rank")):
        return f"expects {'no' if lite else 'a'} q_lora_rank with {config['num_hidden_layers']} layers"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("mscale", rope.get("mscale_all_dim")) != rope.get("mscale_all_dim"):
        return "takes mscale and mscale_all_dim of the rotary positions to be equal"
    if config.get("attention_bias"):
        return "has no biases in the attention"
    return None


LATENT_PIECES = (
    Piece(
        tensor=r"model\.layers\.(\d+)\.self_attn\.kv_b_proj\.weight", name="blk.{layer}.attn_k_b.weight", rows="keys"
    ),
    Piece(
        tensor=r"model\.layers\.(\d+)\.self_attn\.kv_b_proj\.weight", name="blk.{layer}.attn_v_b.weight", rows="values"
    ),
)
