"""dots.llm1: DeepSeek-V3's router."""

from moetools.architectures.base import Architecture
from moetools.architectures.dense import DenseFamily
from moetools.architectures.gguf_family import GROUPED_ROUTER, GgufFamily, grouped
from moetools.architectures.mlx_family import MlxFamily

ARCHITECTURE = Architecture(
    model_type="dots1",
    correction_bias="gate.e_score_correction_bias",
    scoring="sigmoid",
    count_keys=("n_routed_experts", "num_local_experts"),
    min_experts_per_group=2,
    dense=DenseFamily(model_type="qwen3", class_name="Qwen3ForCausalLM"),
    gguf=GgufFamily(
        name="dots1", dense_layers=True, own_head=True, all_heads=True, fields=GROUPED_ROUTER, computed=grouped
    ),
    mlx=MlxFamily(experts="experts", lacks=("attention_bias",)),
)
