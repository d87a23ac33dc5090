"""Whether text and memory are enough for what a recipe does with them."""

import logging
from collections.abc import Mapping, Sequence

from moetools.errors import UserError
from moetools.forward.calibrate import load_statistic
from moetools.methods.conjugate import FEW_COLUMNS
from moetools.methods.router_fit import router_bytes
from moetools.passes.layer_equations import HELD_OUT_EVERY, chosen_rows, first_sequences
from moetools.passes.recipes import Candidate, Recipe
from moetools.passes.sequential import ROUTER_TOKENS
from moetools.passes.token_counts import check_token_counts
from moetools.passes.two_streams import sampled_tokens
from moetools.statistics.base import LayerShape, State
from moetools.text.tokens import TokenData

_LOG = logging.getLogger(__name__)
_LEAST_BLOCK, _LEAST_OUTPUTS = 64, 16
_MORE_TEXT = "more text than that gives a better result"


def tokens_warning(candidates: Sequence[Candidate], layer: int, states: Mapping[str, State], tokens: int) -> str | None:
    """Whether a layer's experts got the tokens the candidates' methods need of them; see `check_token_counts`.

    Args:
        states: the layer's accumulators; without "load" nothing can be said.
    """
    needing = max(candidates, key=lambda candidate: candidate.method.min_tokens, default=None)
    if needing is None or "load" not in states:
        return None
    slots_E = load_statistic("load").finalize(dict(states["load"]))["slots"].sum(0)
    counts = dict(enumerate(slots_E.tolist()))
    return check_token_counts(layer, counts, needing.method.min_tokens, tokens, user=f"method '{needing.name}'")


def check_held_out(data: TokenData, what: str) -> None:
    """Refuse text that leaves no sequence to choose the ridge of a least-squares problem on.

    Args:
        what: solves it, for the message.

    Raises:
        UserError: with the number of sequences.
    """
    firsts = first_sequences(data.batches)
    if not any(bool(chosen_rows(batch, first, True).any()) for batch, first in zip(data.batches, firsts, strict=True)):
        sequences = sum(len(batch.input_ids) for batch in data.batches)
        raise UserError(
            f"{what} chooses its ridge on every {HELD_OUT_EVERY}th sequence, and {sequences} sequences are "
            "too few for that",
            hint=f"at least {2 * HELD_OUT_EVERY} sequences: more text, or a shorter `seq_len`",
        )


def scarce_text(recipes: Sequence[Recipe], tokens: int, *, columns: int, hidden_size: int) -> list[str]:
    """Sentences, also logged, on least-squares problems with more unknowns than tokens.

    Such a problem is solved all the same: its ridge pulls the solution to where it started, and held-out tokens decide.

    Args:
        columns: neurons a joint refit solves for together.
        hidden_size: unknowns of a fitted router row.
    """
    found = []
    if any(recipe.refit == "joint" for recipe in recipes) and tokens < columns:
        found.append(f"`refit=joint` solves for {columns:,} neurons of a layer from {tokens:,} tokens; {_MORE_TEXT}")
    sampled = sampled_tokens(ROUTER_TOKENS, tokens)
    if any(recipe.router == "fitted" for recipe in recipes) and sampled < hidden_size:
        where = f"{sampled:,} tokens; {_MORE_TEXT}" if sampled == tokens else f"a sample of {sampled:,} tokens"
        found.append(f"`router=fitted` solves for {hidden_size:,} numbers per router row from {where}")
    for sentence in found:
        _LOG.warning(sentence)
    return found


def solver_bytes(recipe: Recipe, shape: LayerShape, keep: int, tokens: int) -> int:
    """Memory that a recipe's least squares of one layer need at least; a router is fitted before a refit begins."""
    sampled = sampled_tokens(ROUTER_TOKENS, tokens)
    router = router_bytes(sampled, shape.hidden_size) if recipe.router == "fitted" else 0
    return max(router, _refit_bytes(recipe, shape, keep))


def _refit_bytes(recipe: Recipe, shape: LayerShape, keep: int) -> int:
    if recipe.refit == "none":
        return 0
    experts = 1 if recipe.refit == "members" else shape.num_experts if recipe.combine == "neurons" else keep
    return least_refit_bytes(experts * shape.expert_size, shape.hidden_size)


def least_refit_bytes(columns: int, hidden_size: int) -> int:
    """Of N neurons: their three projections, the start and the right-hand side in fp32, and the narrowest solver.

    20 N D bytes, and 8 N for each column of a preconditioner block, 16 N for each output that is solved at a time; of
    few columns two matrices N x N, and a third while one is summed.
    """
    grams = 12 * columns * columns if columns <= FEW_COLUMNS else 0
    blocks = 8 * min(columns, _LEAST_BLOCK) + 16 * min(hidden_size, _LEAST_OUTPUTS)
    return columns * (20 * hidden_size + blocks) + grams
