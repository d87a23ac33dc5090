"""OLMoE: softmax over all experts, renormalised if norm_topk_prob."""

from moetools.architectures.base import Architecture
from moetools.architectures.gguf_family import GgufFamily
from moetools.architectures.mlx_family import MlxFamily

ARCHITECTURE = Architecture(
    model_type="olmoe",
    width_keys=("intermediate_size",),
    gguf=GgufFamily(
        name="olmoe", normalised=False, own_head=True, all_heads=True, fields={"clip_qkv": "add_clamp_kqv"}
    ),
    mlx=MlxFamily(dense_layers=False, lacks=("clip_qkv",)),
)
