"""Entropy-coded grids: the streams of `moetools.formats.entropy`."""

from moetools.formats.entropy import can_hold, dense_many, hold, pack, shape, unpack, unpack_many
from moetools.grids.entropy import EntropyGrid

__all__ = ["can_hold", "dense_many", "hold", "pack", "shape", "stored_bytes", "unpack", "unpack_many"]


def stored_bytes(grid: EntropyGrid, rows: int, columns: int) -> int:
    """Bytes of a matrix by the grid's rate; how well its codes can be coded is known only behind them."""
    return int(grid.storage_bits(rows, columns) / 8)
