"""What serves all tokens: the shared experts' part of the output, and routed experts that act like shared ones."""

from collections.abc import Mapping
from dataclasses import dataclass

from moetools.pipeline.table import Table
from moetools.statistics.base import State, ratio

LIKE_SHARED_SHARE = 0.8
"""A routed expert that at least this part of every task's tokens choose acts like a shared one."""
MIN_TOKENS = 100
"""Tasks with fewer tokens than this have no say in it."""


@dataclass(frozen=True, kw_only=True)
class LikeShared:
    """A routed expert that nearly every token chooses.

    Attributes:
        tokens: share of all tokens that choose it.
        least: the smallest such share among the tasks with at least 100 tokens.
    """

    expert: int
    tokens: float
    least: float


@dataclass(frozen=True, kw_only=True)
class SharedWork:
    """One layer.

    Attributes:
        norm_share: sum of ||s|| / sum of ||y||, s the shared experts' part of the block's output y. None without any.
        carried: sum of <s, y> / sum of ||y||^2: with the routed experts' part it adds to 1. None without any.
        like_shared: routed experts that at least 80 % of every task's tokens choose; looked for where K <= E / 2.
    """

    norm_share: float | None
    carried: float | None
    like_shared: list[LikeShared]


def shared_work(quantities: Mapping[str, State]) -> SharedWork:
    """From "load" and, if it was measured, "shared_output" of a layer."""
    parts = quantities.get("shared_output")
    measured = parts is not None and bool(parts["tokens"].sum() > 0)
    return SharedWork(
        norm_share=float(parts["shared_norm"].sum() / parts["whole_norm"].sum()) if parts and measured else None,
        carried=float(parts["along"].sum() / parts["energy"].sum()) if parts and measured else None,
        like_shared=_like_shared(quantities["load"]),
    )


def _like_shared(load: State) -> list[LikeShared]:
    slots_GE, tokens_G = load["slots"], load["tokens"]
    judged_G = tokens_G >= MIN_TOKENS
    if not bool(judged_G.any()) or 2 * int(slots_GE.sum()) > slots_GE.shape[1] * int(tokens_G.sum()):
        return []
    least_E = ratio(slots_GE[judged_G], tokens_G[judged_G][:, None]).amin(0)
    pooled_E = ratio(slots_GE.sum(0), tokens_G.sum())
    found = (least_E >= LIKE_SHARED_SHARE).nonzero().squeeze(1).tolist()
    return [LikeShared(expert=e, tokens=float(pooled_E[e]), least=float(least_E[e])) for e in found]


def shared_table(layers: Mapping[int, SharedWork]) -> Table:
    """One row per layer."""
    rows = [
        [
            str(index),
            "none" if layer.norm_share is None else f"{100 * layer.norm_share:.1f}",
            "none" if layer.carried is None else f"{100 * layer.carried:.1f}",
            "  ".join(f"{one.expert}: {100 * one.tokens:.0f}" for one in layer.like_shared) or "none",
        ]
        for index, layer in layers.items()
    ]
    note = (
        "norm: of the shared experts' output, % of the whole block's; carried: % of the block's output along itself, "
        "which adds to 100 with the routed experts'; like shared: routed experts that at least "
        f"{LIKE_SHARED_SHARE:.0%} of every task's tokens choose, and % of all tokens"
    )
    columns = ["layer", "shared experts: norm", "carried", "routed ones like shared"]
    return Table(title="work common to all tokens", columns=columns, rows=rows, note=note)
