"""ERNIE-4.5-MoE: softmax, choice by probability plus correction bias, renormalised; shared experts."""

from moetools.architectures.base import Architecture
from moetools.architectures.dense import DenseFamily

ARCHITECTURE = Architecture(
    model_type="ernie4_5_moe",
    correction_bias="gate.moe_statics.e_score_correction_bias",
    count_keys=("moe_num_experts", "num_experts"),
    top_k_keys=("moe_k", "num_experts_per_tok"),
    extra_tensors=r"mtp",
    dense=DenseFamily(model_type="ernie4_5", class_name="Ernie4_5ForCausalLM"),
)
