"""Entropy-coded grids: the streams of `moetools.formats.entropy`."""

from moetools.formats.entropy import pack, shape, unpack, unpack_many

__all__ = ["pack", "shape", "unpack", "unpack_many"]
