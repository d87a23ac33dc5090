"""DeepSeek-V3/R1: sigmoid scores, choice by score plus correction bias within the best groups; shared experts."""

from moetools.architectures.base import Architecture
from moetools.architectures.dense import DenseFamily
from moetools.architectures.gguf_family import (
    GROUPED_ROUTER,
    LATENT_PIECES,
    GgufFamily,
    grouped,
    latent_attention,
    latent_problem,
)
from moetools.architectures.mlx_family import MlxFamily

ARCHITECTURE = Architecture(
    model_type="deepseek_v3",
    correction_bias="gate.e_score_correction_bias",
    scoring="sigmoid",
    count_keys=("n_routed_experts", "num_local_experts"),
    min_experts_per_group=2,
    dense=DenseFamily(own_keys=("first_k_dense_replace",)),
    gguf=GgufFamily(
        name="deepseek2",
        dense_layers=True,
        yarn=True,
        fields=GROUPED_ROUTER,
        computed=lambda config: {**latent_attention(config), **grouped(config)},
        problem=latent_problem,
        pieces=LATENT_PIECES,
    ),
    mlx=MlxFamily(own_head=True),
)
