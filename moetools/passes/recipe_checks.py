"""Whether text and memory are enough for what a recipe does with them."""

import logging
from collections.abc import Mapping, Sequence

from moetools.errors import UserError
from moetools.forward.calibrate import load_statistic
from moetools.methods.base import ExpertDecision
from moetools.passes.layer_equations import HELD_OUT_EVERY, chosen_rows
from moetools.passes.recipes import Candidate, Recipe, Refit
from moetools.passes.token_counts import check_token_counts
from moetools.statistics.base import State
from moetools.text.tokens import TokenData

_LOG = logging.getLogger(__name__)


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


def layer_warnings(decisions: Mapping[int, ExpertDecision]) -> list[str]:
    """What was warned of while single layers were decided."""
    found: list[str] = []
    for decision in decisions.values():
        refit = decision.details.get("refit")
        for facts in (decision.details, refit if isinstance(refit, Mapping) else {}):
            warning = facts.get("warning")
            found += [warning] if isinstance(warning, str) else []
    return found


def check_held_out(data: TokenData, refit: Refit) -> None:
    """Refuse text that leaves no sequence to choose the ridge of a refit on.

    Raises:
        UserError: with the number of sequences.
    """
    if not any(bool(chosen_rows(batch, number, True).any()) for number, batch in enumerate(data.batches)):
        sequences = sum(len(batch.input_ids) for batch in data.batches)
        raise UserError(
            f"--refit {refit} chooses its ridge on every {HELD_OUT_EVERY}th sequence, and {sequences} sequences are "
            "too few for that",
            hint=f"at least {2 * HELD_OUT_EVERY} sequences: more text, or a shorter --seq-len",
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
        found.append(f"--refit joint solves for {columns:,} neurons of a layer from {tokens:,} tokens")
    if any(recipe.router == "fitted" for recipe in recipes) and tokens < hidden_size:
        found.append(f"--router fitted solves for {hidden_size:,} numbers per router row from {tokens:,} tokens")
    found = [f"{sentence}; more text than that gives a better result" for sentence in found]
    for sentence in found:
        _LOG.warning(sentence)
    return found
