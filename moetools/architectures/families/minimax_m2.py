"""MiniMax-M2: sigmoid scores, choice by score plus correction bias, renormalised."""

from moetools.architectures.base import Architecture
from moetools.architectures.gguf_family import SIGMOID, GgufFamily

ARCHITECTURE = Architecture(
    model_type="minimax_m2",
    correction_bias="e_score_correction_bias",
    scoring="sigmoid",
    count_keys=("num_local_experts", "num_experts"),
    width_keys=("intermediate_size",),
    gguf=GgufFamily(
        name="minimax-m2",
        own_head=True,
        fields={"intermediate_size": "add_expert_feed_forward_length"},
        computed=lambda _config: {"add_expert_gating_func": SIGMOID},
    ),
)
