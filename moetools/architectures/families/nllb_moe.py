"""NLLB-MoE: an M2M-100 with top-2 experts in some layers of encoder and decoder."""

from moetools.architectures.base import Architecture

ARCHITECTURE = Architecture(
    model_type="nllb-moe",
    router="router.classifier",
    count_keys=("num_experts",),
    width_keys=("encoder_ffn_dim",),
    fixed_top_k=2,
    stacks=(
        ("model.encoder.layers", "encoder_layers"),
        ("model.decoder.layers", "decoder_layers"),
    ),
    # NllbMoeExperts.forward makes one-hot vectors of a mask of zeros and ones, as if they were numbers of experts.
    cannot_run="transformers 5.23 sends its tokens to experts 0 and 1 alone, whatever the router chose",
    disk_parts=(
        (r"\.ffn\.router\.", "router"),
        (r"^(model\.)?shared\.|embed_tokens|lm_head", "embedding"),
    ),
)
