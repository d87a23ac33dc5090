"""Phi-3.5-MoE: two rounds of sparse-mixer routing."""

from moetools.architectures.base import Architecture
from moetools.architectures.mlx_family import MlxFamily

ARCHITECTURE = Architecture(
    model_type="phimoe",
    router="router",
    scoring="sparsemixer",
    count_keys=("num_local_experts",),
    width_keys=("intermediate_size",),
    min_experts_per_group=2,
    mlx=MlxFamily(dense_layers=False, own_head=True, needs=("attention_bias", "lm_head_bias")),
)
