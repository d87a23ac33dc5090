"""Which expert follows which: the choices of neighbouring MoE layers for the same tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

from moetools.pipeline.table import Table
from moetools.statistics.base import State, ratio

FOLLOWERS_KEPT = 20
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Follower:
    """Expert i of the MoE layer before and expert j of this one, over all tasks.

    Attributes:
        before, expert: i and j.
        tokens, share: N_ij, and N_ij / T.
        given_before: N_ij / B_i, the share of the tokens of i that go to j.
        lift: N_ij * T / (B_i * N_j); 1 if the two layers chose independently.
    """

    before: int
    expert: int
    tokens: int
    share: float
    given_before: float
    lift: float


@dataclass(frozen=True, kw_only=True)
class Following:
    """How one layer's choices follow those of the MoE layer before.

    Attributes:
        layer_before: index of that layer.
        information: of one choice before about one choice now, nats (`statistics.succession`).
        followers: the 20 pairs with most tokens beyond independence, N_ij - B_i N_j / T; the statistics file holds all.
    """

    layer_before: int
    information: float
    followers: list[Follower]


def following(quantities: State, layer_before: int) -> Following:
    """From "succession" of a layer that is not the first."""
    pairs_EE, tokens = quantities["pairs"], quantities["tokens"]
    excess_EE = pairs_EE - ratio(quantities["before"][:, None].double() * quantities["chosen"], tokens)
    order = excess_EE.flatten().argsort(descending=True, stable=True)[:FOLLOWERS_KEPT].tolist()
    places = [divmod(place, len(pairs_EE)) for place in order]
    share_EE = ratio(pairs_EE, tokens)
    return Following(
        layer_before=layer_before,
        information=float(quantities["information"]),
        followers=[
            Follower(
                before=i,
                expert=j,
                tokens=int(pairs_EE[i, j]),
                share=float(share_EE[i, j]),
                given_before=float(quantities["conditional"][i, j]),
                lift=float(quantities["lift"][i, j]),
            )
            for i, j in places
            if pairs_EE[i, j] > 0
        ],
    )


def following_table(layers: Mapping[int, Following]) -> Table:
    """The strongest pairs of every layer but the first."""
    rows = [
        [
            f"{layer.layer_before} to {index}",
            f"{pair.before} to {pair.expert}",
            f"{pair.share:.1%}",
            f"{pair.given_before:.1%}",
            f"{pair.lift:.2f}",
            f"{layer.information:.4f}",
        ]
        for index, layer in layers.items()
        for pair in layer.followers[:_SHOWN]
    ]
    note = (
        "the pairs with most tokens beyond what independent layers would give (lift 1); I: what one choice says about "
        "one choice of the next layer, nats"
    )
    columns = ["layers", "i to j", "tokens", "j behind i", "lift", "I(i; j)"]
    return Table(title="experts that follow each other", columns=columns, rows=rows, note=note)
