"""A rough idea of how long a run takes, for `--dry-run`."""

import time

import torch

from moetools.forward.streaming import StreamedModel

_DISK_BYTES_PER_SECOND = 5e8
_EFFICIENCY = 0.3
_SIZE = 1024


def estimate_seconds(model: StreamedModel, tokens: int, *, read_bytes: int, written_bytes: int) -> float:
    """2 FLOP per active parameter and token at a third of the matrix throughput measured here and now, plus disk time.

    Good to a factor of two or so: attention, cache misses and a cold disk are not modelled.
    """
    flops = 2 * tokens * active_parameters(model)
    return flops / (_EFFICIENCY * _matmul_throughput(model)) + (read_bytes + written_bytes) / _DISK_BYTES_PER_SECOND


def active_parameters(model: StreamedModel) -> int:
    """Parameters of the decoder layers that one token uses."""
    total = 0
    for index in range(model.num_layers):
        layer = model.stock.layer(index)
        total += sum(parameter.numel() for parameter in layer.parameters())
        moe = model.stock.moe_layers.get(index)
        if moe is not None:
            shape, module = model.layer_shape(1), layer.get_submodule(moe.inside(model.arch.experts))
            experts = sum(parameter.numel() for parameter in module.parameters())
            total += experts * shape.top_k // shape.num_experts - experts
    return total


def _matmul_throughput(model: StreamedModel) -> float:
    """Measured FLOP/s of a square product in the compute dtype, second run."""
    left = torch.ones(_SIZE, _SIZE, device=model.device, dtype=model.dtype)
    elapsed = 1.0
    for _ in range(2):
        start = time.perf_counter()
        (left @ left)[0, 0].item()
        elapsed = time.perf_counter() - start
    return 2 * _SIZE**3 / elapsed
