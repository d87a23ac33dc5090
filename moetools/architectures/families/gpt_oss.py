"""gpt-oss: top-k of the logits, then softmax over those; experts transposed, interleaved and with biases."""

from moetools.architectures.base import Architecture

ARCHITECTURE = Architecture(
    model_type="gpt_oss",
    router="router",
    router_bias="router.bias",
    scoring="topk_softmax",
    count_keys=("num_local_experts", "num_experts"),
    top_k_keys=("num_experts_per_tok", "experts_per_token"),
    width_keys=("intermediate_size",),
)
