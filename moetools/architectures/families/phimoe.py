"""Phi-3.5-MoE: two rounds of sparse-mixer routing."""

from moetools.architectures.base import Architecture

ARCHITECTURE = Architecture(
    model_type="phimoe",
    router="router",
    scoring="sparsemixer",
    count_keys=("num_local_experts",),
    width_keys=("intermediate_size",),
    min_experts_per_group=2,
)
