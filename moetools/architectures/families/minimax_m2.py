"""MiniMax-M2: sigmoid scores, choice by score plus correction bias, renormalised."""

from moetools.architectures.base import Architecture

ARCHITECTURE = Architecture(
    model_type="minimax_m2",
    correction_bias="e_score_correction_bias",
    scoring="sigmoid",
    count_keys=("num_local_experts", "num_experts"),
    width_keys=("intermediate_size",),
)
