"""Qwen1.5/2-MoE: softmax, renormalised only if norm_topk_prob; one gated shared expert."""

from moetools.architectures.base import Architecture
from moetools.architectures.dense import DenseFamily
from moetools.architectures.gguf_family import GgufFamily
from moetools.architectures.mlx_family import MlxFamily

ARCHITECTURE = Architecture(
    model_type="qwen2_moe",
    disk_parts=((r"shared_expert_gate", "shared experts"),),
    dense=DenseFamily(model_type="qwen2", class_name="Qwen2ForCausalLM"),
    gguf=GgufFamily(
        name="qwen2moe",
        normalised=False,
        own_head=True,
        fields={
            "moe_intermediate_size": "add_expert_feed_forward_length",
            "shared_expert_intermediate_size": "add_expert_shared_feed_forward_length",
        },
    ),
    mlx=MlxFamily(normalised=False, dense_layers=False, own_head=True),
)
