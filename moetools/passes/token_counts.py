"""Whether calibration reached the experts of a layer often enough for what is read about them."""

import logging
from collections.abc import Mapping, Sequence

from moetools.errors import StatisticsError

_LOG = logging.getLogger(__name__)
_SHOWN = 6
_DEAD = 100


def check_token_counts(
    layer: int, counts: Mapping[int, int], needed: int, tokens: int, *, user: str, what: str = "experts"
) -> str | None:
    """Refuse a layer most of whose experts got too few tokens; where some did, say so in a sentence, also logged.

    An expert without any token where the experts got 100 times `needed` on average is dead, not short of text, and is
    not counted.

    Args:
        counts: tokens that were routed to each expert.
        needed: tokens each of them needs; 0 asks for nothing.
        tokens: calibration tokens in all.
        user: what needs them, for the message.

    Raises:
        StatisticsError: more than half of the experts are below `needed`; with their counts and how much text would do.
    """
    ample = sum(counts.values()) >= _DEAD * needed * len(counts)
    few = sorted(expert for expert, count in counts.items() if count < needed and (count or not ample))
    if not few:
        return None
    message = (
        f"layer {layer}: {len(few)} of {len(counts)} {what} got fewer than the {needed} calibration tokens that "
        f"{user} needs of each: {_some(few, counts)}"
    )
    hint = _enough(few, counts, needed, tokens)
    if 2 * len(few) > len(counts):
        raise StatisticsError(message, hint=hint)
    _LOG.warning("%s; %s", message, hint)
    return f"{message}; {hint}"


def _some(few: Sequence[int], counts: Mapping[int, int]) -> str:
    listed = ", ".join(f"{expert} ({counts[expert]})" for expert in few[:_SHOWN])
    return listed + (f" and {len(few) - _SHOWN} more" if len(few) > _SHOWN else "")


def _enough(few: Sequence[int], counts: Mapping[int, int], needed: int, tokens: int) -> str:
    """Tokens in proportion to the load of the least used expert that was reached at all."""
    reached = [counts[expert] for expert in few if counts[expert]]
    if not reached:
        return f"none of these was chosen in {tokens:,} tokens; more varied text may reach them"
    wanted = -(-tokens * needed // min(reached))
    never = len(few) - len(reached)
    rest = f" ({never} of these were never chosen)" if never else ""
    return f"about {wanted:,} calibration tokens instead of {tokens:,} would do{rest}"
