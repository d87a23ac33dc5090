"""Granite-MoE: top-k of the logits, then softmax over those; experts fused on disk as 3-D tensors."""

from moetools.architectures.base import Architecture
from moetools.architectures.dense import DenseFamily
from moetools.architectures.gguf_family import GgufFamily
from moetools.architectures.mlx_family import MlxFamily
from moetools.architectures.pieces import Piece

_MLX = "model.layers.{layer}.block_sparse_moe.switch_mlp."
_BLOCK = r"model\.layers\.(\d+)\.block_sparse_moe\."

ARCHITECTURE = Architecture(
    model_type="granitemoe",
    router="router",
    scoring="topk_softmax",
    count_keys=("num_local_experts",),
    width_keys=("intermediate_size",),
    disk_parts=((r"block_sparse_moe\.(input|output)_linear", "experts"),),
    dense=DenseFamily(model_type="granite", class_name="GraniteForCausalLM"),
    mlx=MlxFamily(
        dense_layers=False,
        pieces=(
            Piece(tensor=_BLOCK + r"input_linear\.weight", name=_MLX + "gate_proj.weight", rows="first half"),
            Piece(tensor=_BLOCK + r"input_linear\.weight", name=_MLX + "up_proj.weight", rows="second half"),
            Piece(tensor=_BLOCK + r"output_linear\.weight", name=_MLX + "down_proj.weight"),
        ),
    ),
    gguf=GgufFamily(
        name="granitemoe",
        neighbours=True,
        fields={
            "attention_multiplier": "add_attention_scale",
            "embedding_multiplier": "add_embedding_scale",
            "residual_multiplier": "add_residual_scale",
        },
        computed=lambda config: {"add_logit_scale": config.get("logits_scaling") or 1.0},
        pieces=(
            Piece(tensor=_BLOCK + "input_linear.weight", name="blk.{layer}.ffn_gate_exps.weight", rows="first half"),
            Piece(tensor=_BLOCK + "input_linear.weight", name="blk.{layer}.ffn_up_exps.weight", rows="second half"),
        ),
    ),
)
