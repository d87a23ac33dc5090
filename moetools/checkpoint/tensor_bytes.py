"""Tensors to bytes and back, for every dtype that both torch and the safetensors format have."""

from typing import BinaryIO

import torch
from torch import Tensor

from moetools.checkpoint.headers import TensorInfo
from moetools.errors import CheckpointError

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F4": torch.float4_e2m1fn_x2,
}  # fmt: skip

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def read_tensor(stream: BinaryIO, info: TensorInfo) -> Tensor:
    """Reads one tensor from its (unbuffered) file into memory of its own; no mapping of the file is left behind.

    Raises:
        CheckpointError: the file got shorter since its header was read, or torch has no such dtype.
    """
    if info.dtype not in TORCH_DTYPES or (info.dtype == "F4" and info.shape[-1] % 2):
        raise CheckpointError(
            f"{info.file}: tensor '{info.name}' is {info.dtype} {list(info.shape)}, which torch cannot hold"
        )
    flat = torch.empty(info.nbytes, dtype=torch.uint8)
    stream.seek(info.offset)
    rest = flat.numpy().data
    while rest:
        count = stream.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            message = f"{info.file}: {len(rest)} of {info.nbytes} bytes of '{info.name}' are missing: it got shorter"
            raise CheckpointError(message, hint="do not change a model while it is being read")
        rest = rest[count:]
    return flat.view(TORCH_DTYPES[info.dtype]).reshape(_torch_shape(info))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of `tensor` in row-major order; a copy only where it is not contiguous or not in main memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def header_entry(name: str, tensor: Tensor) -> tuple[str, str, list[int], int]:
    """(name, dtype, shape, nbytes) of `tensor` as a header records it."""
    shape = list(tensor.shape)
    if tensor.dtype == torch.float4_e2m1fn_x2:
        # torch counts pairs of 4-bit values, the format counts values.
        shape[-1] *= 2
    return name, DTYPE_NAMES[tensor.dtype], shape, tensor.numel() * tensor.element_size()


def _torch_shape(info: TensorInfo) -> tuple[int, ...]:
    return (*info.shape[:-1], info.shape[-1] // 2) if info.dtype == "F4" else info.shape
