"""How much text choices are tried out on, so that planning costs few passes over the calibration text."""

import math
from collections.abc import Sequence

from moetools.verbs.compress.prediction import Probe

PASSES = 3
"""Over the calibration text, that planning may take."""
MOST_TOKENS = 16384
JOINT, JOINT_PASSES = 3, 5
"""Plans that are tried out with both, and runs over the text that one takes (`Probe.passes`)."""
LEARNING_PASSES = 5
"""Of the two that are repeated on other text: one reduction, one quantization."""


def probe_tokens(singles: Sequence[Probe], calibration_tokens: int, *, joint: bool) -> int:
    """Tokens of the little text, for calibrating and again for judging.

    A probe runs over its calibration text `Probe.passes` times, and once over the text that it is judged on, as the
    original does.

    Args:
        singles: choices that are tried out alone.
        joint: whether there are plans that have both fewer experts and fewer bits.
    """
    runs = 1 + sum(probe.passes + 1 for probe in singles)
    runs += JOINT * (JOINT_PASSES + 1) if joint else 0
    return min(MOST_TOKENS, math.floor(PASSES * calibration_tokens / runs))
