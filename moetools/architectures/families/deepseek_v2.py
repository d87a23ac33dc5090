"""DeepSeek-V2: softmax, greedy or group-limited choice, scaled by routed_scaling_factor; shared experts."""

from moetools.architectures.base import Architecture

ARCHITECTURE = Architecture(
    model_type="deepseek_v2",
    count_keys=("n_routed_experts", "num_experts"),
)
