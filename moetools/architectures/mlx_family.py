"""How a Mixture-of-Experts family is called and computed in mlx-lm."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moetools.architectures.pieces import Change, Piece


@dataclass(frozen=True, kw_only=True)
class MlxFamily:
    """What mlx-lm takes for granted about a family.

    Attributes:
        experts: name of the stacked experts in an MoE block.
        normalised: whether it makes the weights of the chosen experts sum to one; config.json must say the same of
            `norm_topk_prob`. None where it reads that key, or transformers has no choice either.
        dense_layers: whether some layers may have a dense FFN.
        own_head: the output matrix has to be there even where it is the embeddings.
        window: whether it has sliding windows.
        needs: config keys that must have a value that is not empty, false or 0.
        lacks: config keys that must have none.
        defaults: config.json -> keys that it reads, for where config.json has none of them.
        problem: config.json -> why it would compute something else; None where it would not.
        pieces: tensors that are parts of those on disk, beside the experts that lie apart on disk.
        changed: patterns of whole names on disk, and what becomes of those vectors and filters.
        dropped: pattern of whole names on disk that it has not; they must hold zeros.
    """

    experts: str = "switch_mlp"
    normalised: bool | None = None
    dense_layers: bool = True
    own_head: bool = False
    window: bool = False
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    problem: Callable[[Mapping[str, Any]], str | None] | None = None
    pieces: tuple[Piece, ...] = ()
    changed: tuple[tuple[str, Change], ...] = ()
    dropped: str | None = None
