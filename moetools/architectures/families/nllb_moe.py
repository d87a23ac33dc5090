"""NLLB-MoE: an M2M-100 with top-2 experts in some layers of encoder and decoder."""

from moetools.architectures.base import Architecture

ARCHITECTURE = Architecture(
    model_type="nllb-moe",
    router="router.classifier",
    count_keys=("num_experts",),
    width_keys=("encoder_ffn_dim",),
    fixed_top_k=2,
    stacks=(
        (r"^model\.encoder\.layers\.(\d+)\.", "encoder_layers"),
        (r"^model\.decoder\.layers\.(\d+)\.", "decoder_layers"),
    ),
    disk_parts=(
        (r"\.ffn\.router\.", "router"),
        (r"^(model\.)?shared\.|embed_tokens|lm_head", "embedding"),
    ),
)
