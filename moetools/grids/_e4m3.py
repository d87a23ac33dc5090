"""The eight-bit float E4M3 without infinities (`torch.float8_e4m3fn`)."""

import torch
from torch import Tensor

LARGEST = 448.0
"""The largest E4M3 number."""

OCTAVE_STEPS = 8
"""Scales tried between the one that takes the largest weight to 448 and twice that.

Scales an octave apart differ in the range of subnormals alone, so this covers all that can be gained without cutting
off the largest weight.
"""


def round_e4m3(value: Tensor) -> Tensor:
    """The nearest E4M3 number (ties to even); the largest for all beyond it, never NaN."""
    return value.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
