"""GLM-4.5/4.6: DeepSeek-V3's router."""

from moetools.architectures.base import Architecture
from moetools.architectures.dense import DenseFamily
from moetools.architectures.gguf_family import GROUPED_ROUTER, GgufFamily, grouped
from moetools.architectures.mlx_family import MlxFamily

ARCHITECTURE = Architecture(
    model_type="glm4_moe",
    correction_bias="gate.e_score_correction_bias",
    scoring="sigmoid",
    count_keys=("n_routed_experts", "num_local_experts"),
    min_experts_per_group=2,
    dense=DenseFamily(own_keys=("first_k_dense_replace",)),
    gguf=GgufFamily(name="glm4moe", dense_layers=True, fields=GROUPED_ROUTER, computed=grouped),
    mlx=MlxFamily(own_head=True),
)
