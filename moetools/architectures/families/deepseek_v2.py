"""DeepSeek-V2: softmax, greedy or group-limited choice, scaled by routed_scaling_factor; shared experts."""

from moetools.architectures.base import Architecture
from moetools.architectures.dense import DenseFamily
from moetools.architectures.mlx_family import MlxFamily

ARCHITECTURE = Architecture(
    model_type="deepseek_v2",
    count_keys=("n_routed_experts", "num_experts"),
    dense=DenseFamily(first_dense_key="first_k_dense_replace"),
    mlx=MlxFamily(own_head=True, needs=("rope_scaling",)),
)
