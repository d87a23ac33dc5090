"""The four-bit float E2M1 of the OCP microscaling formats: sign, two exponent bits, one mantissa bit."""

import torch
from torch import Tensor

LARGEST = 6.0
"""The largest E2M1 value."""

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def encode_e2m1(value: Tensor) -> Tensor:
    """uint8 codes 0..15 of the nearest values; bit 3 is the sign, and zero is always code 0."""
    magnitude = torch.bucketize(value.abs().contiguous(), torch.tensor(_MIDDLES, device=value.device), out_int32=True)
    return (magnitude + 8 * ((value < 0) & (magnitude > 0))).to(torch.uint8)


def decode_e2m1(code: Tensor) -> Tensor:
    """The values of codes 0..15, fp32."""
    table = torch.tensor([*_VALUES, *(-value for value in _VALUES)], device=code.device)
    return table[code.int()]
