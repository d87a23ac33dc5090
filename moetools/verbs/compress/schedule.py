"""How much text choices are tried out on, so that planning costs few passes over the calibration text."""

import math
from collections.abc import Sequence

from moetools.passes.layer_equations import HELD_OUT_EVERY
from moetools.verbs.compress.prediction import JOINT_PASSES, LEARNING_PASSES, Probe

PASSES = 3
"""Over the calibration text, that planning may take."""
MOST_TOKENS = 16384
MORE = 4
"""More text, on which two reductions and one quantization are tried out again, in little texts."""
REFIT_SEQUENCES = 2 * HELD_OUT_EVERY
"""That a refit needs: every seventh is held out of it."""
JOINT = 3
"""Plans that are tried out with both."""
_MARGIN = 0.95
"""Some layers of a run are looked at once more."""


def probe_tokens(singles: Sequence[Probe], calibration_tokens: int, *, joint: bool) -> int:
    """Tokens of the little text, for calibrating and again for judging.

    A probe runs over its calibration text `Probe.passes` times, and once over the text that it is judged on, as the
    original does.

    Args:
        singles: choices that are tried out alone.
        joint: whether there are plans that have both fewer experts and fewer bits.
    """
    runs = 1 + sum(probe.passes + 1 for probe in singles)
    runs += LEARNING_PASSES * MORE + 3
    runs += JOINT * (JOINT_PASSES + 1) if joint else 0
    return min(MOST_TOKENS, math.floor(_MARGIN * PASSES * calibration_tokens / runs))


def passes_taken(probes: Sequence[tuple[Probe, int]], judged: int, calibration_tokens: int) -> float:
    """Passes over the calibration text that measurements come to.

    Args:
        probes: with the tokens of the text that each was built on.
        judged: tokens that each, and the original, was judged on.
    """
    spent = sum(probe.passes * tokens + judged for probe, tokens in probes)
    return (spent + judged) / calibration_tokens
