"""How a Mixture-of-Experts family is called and computed in mlx-lm."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MlxFamily:
    """What mlx-lm takes for granted about a family.

    Attributes:
        experts: name of the stacked experts in an MoE block.
        normalised: whether it makes the weights of the chosen experts sum to one; config.json must say the same of
            `norm_topk_prob`. None where it reads that key, or transformers has no choice either.
        dense_layers: whether some layers may have a dense FFN.
        own_head: the output matrix has to be there even where it is the embeddings.
        needs: config keys that must have a value that is not empty, false or 0.
        lacks: config keys that must have none.
    """

    experts: str = "switch_mlp"
    normalised: bool | None = None
    dense_layers: bool = True
    own_head: bool = False
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
