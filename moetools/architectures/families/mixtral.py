"""Mixtral: softmax over all experts, top-k renormalised; disk names w1 (gate), w2 (down), w3 (up)."""

from moetools.architectures.base import Architecture

ARCHITECTURE = Architecture(
    model_type="mixtral",
    count_keys=("num_local_experts", "num_experts"),
    width_keys=("intermediate_size",),
)
