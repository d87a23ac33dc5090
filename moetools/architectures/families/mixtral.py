"""Mixtral: softmax over all experts, top-k renormalised; disk names w1 (gate), w2 (down), w3 (up)."""

from moetools.architectures.base import Architecture
from moetools.architectures.dense import DenseFamily
from moetools.architectures.gguf_family import GgufFamily
from moetools.architectures.mlx_family import MlxFamily

ARCHITECTURE = Architecture(
    model_type="mixtral",
    count_keys=("num_local_experts", "num_experts"),
    width_keys=("intermediate_size",),
    dense=DenseFamily(model_type="mistral", class_name="MistralForCausalLM"),
    gguf=GgufFamily(name="llama", neighbours=True),
    mlx=MlxFamily(dense_layers=False),
)
