"""Granite-MoE: top-k of the logits, then softmax over those; experts fused on disk as 3-D tensors."""

from moetools.architectures.base import Architecture
from moetools.architectures.dense import DenseFamily

ARCHITECTURE = Architecture(
    model_type="granitemoe",
    router="router",
    scoring="topk_softmax",
    count_keys=("num_local_experts",),
    width_keys=("intermediate_size",),
    disk_parts=((r"block_sparse_moe\.(input|output)_linear", "experts"),),
    dense=DenseFamily(model_type="granite", class_name="GraniteForCausalLM"),
)
