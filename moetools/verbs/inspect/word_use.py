"""Token ids and positions that experts specialise in: what they say about the choice of experts, and who owns what."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from moetools.pipeline.table import Table
from moetools.statistics.base import State, ratio
from moetools.verbs.inspect.information import mutual_information

OWNED_SHARE = 0.5
"""An expert owns a token id that at least this part of its occurrences choose it for,"""
OWNED_LIFT = 2.0
"""and at least so many times as many as of all tokens,"""
OWNED_TOKENS = 20
"""if it occurs so often."""
OWNED_KEPT = 10
BOOTSTRAP_DRAWS = 100
_AT_ONCE = 20
_EXPERTS_SHOWN, _WORDS_SHOWN = 4, 4

Decode = Callable[[int], str]


@dataclass(frozen=True, kw_only=True)
class Dependence:
    """How far the choice of experts follows token ids, or positions; nats.

    Attributes:
        information: I(kind; expert) over slots.
        null: the same with every sequence shuffled (`statistics.word_use`).
        excess: information - null, less the bias that bootstrap samples of blocks of sequences show.
        low, high: its 95 % interval (basic bootstrap).
    """

    information: float
    null: float
    excess: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class OwnedWord:
    """A token id that an expert owns: at least half of its occurrences choose it, twice as many as of all tokens.

    Attributes:
        token_id, text: the id, and what it stands for (None without a tokenizer).
        tokens: occurrences.
        share: of them, for which the expert was chosen.
        lift: share / the share of all tokens.
    """

    token_id: int
    text: str | None
    tokens: int
    share: float
    lift: float


@dataclass(frozen=True, kw_only=True)
class WordReport:
    """One layer, over all tasks.

    Attributes:
        words: dependence on the token ids that are told apart, the most frequent ones; all others count as one.
        positions: on the position in the sequence, in bins that double.
        covered: share of tokens with an id that is told apart.
        owned: expert -> its ids, at most 10, by occurrences beyond what the expert's own share explains.
    """

    words: Dependence
    positions: Dependence
    covered: float
    owned: Mapping[int, list[OwnedWord]]


def word_report(
    state: State, token_ids: Sequence[int], *, top_k: int, seed: int, decode: Decode | None
) -> WordReport | None:
    """From "word_use" of a layer; None where nothing was counted."""
    slots_WE = state["words"].sum(0)
    total = int(slots_WE.sum())
    if not total:
        return None
    return WordReport(
        words=dependence(state["words"], state["words_null"], seed=seed),
        positions=dependence(state["positions"], state["positions_null"], seed=seed),
        covered=int(slots_WE[:-1].sum()) / total,
        owned=_owned(slots_WE, token_ids, top_k, decode),
    )


def dependence(
    slots_BWE: Int[Tensor, "B W E"], null_BWE: Int[Tensor, "B W E"], *, seed: int, draws: int = BOOTSTRAP_DRAWS
) -> Dependence:
    """Of counts in blocks of sequences: blocks are drawn with replacement, the same ones for the null."""
    blocks = len(slots_BWE)
    drawn_RB = torch.randint(blocks, (draws, blocks), generator=torch.Generator().manual_seed(seed))
    times_RB = torch.zeros(draws, blocks).scatter_add_(1, drawn_RB, torch.ones(drawn_RB.shape)).double()
    samples = []
    for some_RB in times_RB.split(_AT_ONCE):
        real_R, null_R = (
            mutual_information((some_RB @ one.double().flatten(1)).unflatten(1, one.shape[1:]))
            for one in (slots_BWE, null_BWE)
        )
        samples.append(real_R - null_R)
    sampled_R = torch.cat(samples)
    low, high = sampled_R.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    information, null = float(mutual_information(slots_BWE.sum(0))), float(mutual_information(null_BWE.sum(0)))
    found = information - null
    # Sampled blocks repeat their sequences: they are off from what was measured as that is from the truth.
    return Dependence(
        information=information,
        null=null,
        excess=2 * found - float(sampled_R.mean()),
        low=2 * found - high,
        high=2 * found - low,
    )


def _owned(slots_WE: Tensor, token_ids: Sequence[int], top_k: int, decode: Decode | None) -> dict[int, list[OwnedWord]]:
    tokens_W = slots_WE.sum(1) // top_k
    overall_E = ratio(slots_WE.sum(0), tokens_W.sum())
    share_WE = ratio(slots_WE, tokens_W[:, None])
    lift_WE = ratio(share_WE, overall_E.expand_as(share_WE))
    owned_WE = (share_WE >= OWNED_SHARE) & (lift_WE >= OWNED_LIFT) & (tokens_W >= OWNED_TOKENS)[:, None]
    # The last row is of all other ids together.
    owned_WE[-1] = False
    excess_WE = torch.where(owned_WE, slots_WE - overall_E * tokens_W[:, None], -1.0)
    best = excess_WE.argsort(dim=0, descending=True, stable=True)[:OWNED_KEPT].T.tolist()
    return {
        expert: [
            OwnedWord(
                token_id=token_ids[word],
                text=decode(token_ids[word]) if decode is not None else None,
                tokens=int(tokens_W[word]),
                share=float(share_WE[word, expert]),
                lift=float(lift_WE[word, expert]),
            )
            for word in words
            if owned_WE[word, expert]
        ]
        for expert, words in enumerate(best)
        if owned_WE[:, expert].any()
    }


def word_table(layers: Mapping[int, WordReport]) -> Table:
    """One row per layer."""
    rows = [
        [
            str(index),
            *(cell for one in (layer.words, layer.positions) for cell in _dependence_cells(one)),
            _owners(layer.owned),
        ]
        for index, layer in layers.items()
    ]
    covered = next(iter(layers.values())).covered
    note = (
        f"I: information about the expert, nats, and beyond the null (95 %), in which the tokens of a sequence change "
        f"places; the ids told apart are {covered:.0%} of the tokens, the rest counts as one id; owned: at least "
        f"{OWNED_SHARE:.0%} of {OWNED_TOKENS} or more occurrences choose the expert, {OWNED_LIFT:g} times as many as "
        "of all tokens"
    )
    columns = [
        "layer",
        "I(id; expert)",
        "beyond null",
        "I(position; expert)",
        "beyond the null",
        "experts and what they own",
    ]
    return Table(title="token ids and positions", columns=columns, rows=rows, note=note)


def _dependence_cells(one: Dependence) -> list[str]:
    return [f"{one.information:.4f}", f"{one.excess:.4f} ({one.low:.4f} to {one.high:.4f})"]


def _owners(owned: Mapping[int, list[OwnedWord]]) -> str:
    """The experts with most ids, and their first ones."""
    most = sorted(owned, key=lambda expert: (-len(owned[expert]), expert))[:_EXPERTS_SHOWN]
    return "  ".join(f"{expert}: {' '.join(map(_shown, owned[expert][:_WORDS_SHOWN]))}" for expert in most) or "none"


def _shown(word: OwnedWord) -> str:
    return f"#{word.token_id}" if word.text is None else repr(word.text)
