"""OLMoE: softmax over all experts, renormalised if norm_topk_prob."""

from moetools.architectures.base import Architecture

ARCHITECTURE = Architecture(
    model_type="olmoe",
    width_keys=("intermediate_size",),
)
