"""Qwen1.5/2-MoE: softmax, renormalised only if norm_topk_prob; one gated shared expert."""

from moetools.architectures.base import Architecture
from moetools.architectures.dense import DenseFamily

ARCHITECTURE = Architecture(
    model_type="qwen2_moe",
    disk_parts=((r"shared_expert_gate", "shared experts"),),
    dense=DenseFamily(model_type="qwen2", class_name="Qwen2ForCausalLM"),
)
