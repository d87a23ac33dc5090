"""How a Mixture-of-Experts family is called and computed in llama.cpp."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """What a GGUF file of the family says, and what llama.cpp takes for granted about it.

    Attributes:
        name: the architecture in llama.cpp.
        normalised: whether llama.cpp makes the weights of the chosen experts sum to one; config.json must say the same
            of `norm_topk_prob`. None where transformers has no choice either.
        own_head: the output matrix has to be in the file even where it is the embeddings.
        neighbours: rotary positions turn neighbouring pairs of rows, where transformers turns halves.
        all_heads: only models with as many key-value heads as heads are loaded.
        fields: config key -> the method of gguf's writer that takes its value, where config.json has one.
    """

    name: str
    normalised: bool | None = None
    own_head: bool = False
    neighbours: bool = False
    all_heads: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
