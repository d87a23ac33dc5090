"""Switch Transformers: a T5 with top-1 experts in some layers of encoder and decoder."""

from moetools.architectures.base import Architecture

ARCHITECTURE = Architecture(
    model_type="switch_transformers",
    router="router.classifier",
    count_keys=("num_experts",),
    width_keys=("d_ff",),
    fixed_top_k=1,
    stacks=(
        ("encoder.block", "num_layers"),
        ("decoder.block", "num_decoder_layers"),
    ),
    disk_parts=(
        (r"(Self|EncDec)Attention\.", "attention"),
        (r"^shared\.|embed_tokens|lm_head", "embedding"),
    ),
)
