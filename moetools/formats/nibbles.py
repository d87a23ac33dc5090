"""Two four-bit E2M1 codes in a byte, the even column in the low half, as compressed-tensors packs them."""

import torch
from jaxtyping import UInt8
from torch import Tensor

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack_nibbles(codes_OI: UInt8[Tensor, "O I"]) -> UInt8[Tensor, "O H"]:
    """Codes 0 to 15 (sign in bit 3, then exponent and mantissa) of an even number of columns."""
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    magnitude = torch.tensor(_VALUES)[(codes_OI & 7).long()]
    return pack_fp4_to_uint8(torch.where(codes_OI >= 8, -magnitude, magnitude))


def unpack_nibbles(packed_OH: UInt8[Tensor, "O H"]) -> UInt8[Tensor, "O I"]:
    """The codes again."""
    return torch.stack((packed_OH & 15, packed_OH >> 4), dim=-1).flatten(-2)
