"""Matrices of moetools' own format that stay packed in memory and are decoded when they are needed."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetools.formats import entropy
from moetools.formats.payloads import integer
from moetools.grids.base import Quantized
from moetools.plugins import load_plugin

_PAYLOADS = "moetools.formats.payloads"


class Held(ABC):
    """Some packed matrices, known by their number. Whoever keeps the tensors may move them: `on` takes them back."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that takes memory."""

    @abstractmethod
    def on(self, tensors: Mapping[str, Tensor]) -> "Held":
        """The same matrices with `tensors`, the same ones elsewhere."""

    @abstractmethod
    def dense(self, groups: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
        """Weights of groups of matrices, the rows of a group's one behind the other [O, I], as they were packed.

        All are decoded together, on the device of the tensors.

        Raises:
            CheckpointError: code that is damaged under a right checksum.
        """


def hold(named: Sequence[tuple[str, str, Tensor]]) -> Held:
    """Matrices by kind of grid, name and bytes, numbered in this order; checksums are checked here.

    Raises:
        CheckpointError: a checksum that is wrong, or contents that are impossible.
    """
    chunked = [kind == "entropy" and entropy.can_hold(name, {f"{name}_{kind}": stream}) for kind, name, stream in named]
    together = [number for number, one in enumerate(chunked) if one]
    alone = [number for number, one in enumerate(chunked) if not one]
    parts: list[tuple[Held, list[int]]] = []
    if together:
        some = [(named[number][1], {f"{named[number][1]}_entropy": named[number][2]}) for number in together]
        parts.append((_Bank(entropy.hold(some)), together))
    if alone:
        parts.append((_Streams.of([named[number] for number in alone]), alone))
    return parts[0][0] if len(parts) == 1 else _Both(parts=tuple(parts))


@dataclass(frozen=True)
class _Bank(Held):
    """Chunks of entropy-coded matrices, decoded together."""

    bank: entropy.Bank

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.bank.tensors

    def on(self, tensors: Mapping[str, Tensor]) -> "_Bank":
        return _Bank(self.bank.on(tensors))

    def dense(self, groups: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
        return self.bank.dense(groups, dtype)


@dataclass(frozen=True)
class _Streams(Held):
    """Byte strings as they lie on disk: all kinds of grids, and entropy-coded matrices of the older layout."""

    kinds: tuple[str, ...]
    names: tuple[str, ...]
    streams: tuple[Tensor, ...]

    @staticmethod
    def of(named: Sequence[tuple[str, str, Tensor]]) -> "_Streams":
        for kind, name, stream in named:
            load_plugin(_PAYLOADS, kind, kind="packed kind of grid").unpack(name, {f"{name}_{kind}": stream})
        kinds, names, streams = zip(*named, strict=True)
        return _Streams(kinds, names, streams)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {f"stream_{number}": stream for number, stream in enumerate(self.streams)}

    def on(self, tensors: Mapping[str, Tensor]) -> "_Streams":
        return _Streams(self.kinds, self.names, tuple(tensors[name] for name in self.tensors))

    def dense(self, groups: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
        numbers = list(itertools.chain(*groups))
        coded = [number for number in numbers if self.kinds[number] == "entropy"]
        named = [(self.names[number], {f"{self.names[number]}_entropy": self.streams[number]}) for number in coded]
        found = dict(zip(coded, entropy.dense_many(named, dtype), strict=True))
        for number in numbers:
            if self.kinds[number] != "entropy":
                found[number] = self._unpacked(number).dequantize()[0].to(dtype)
        return _joined(groups, found)

    def _unpacked(self, number: int) -> Quantized:
        kind, name, stream = self.kinds[number], self.names[number], self.streams[number]
        if kind == "integer":
            return integer.unpack_stream(name, stream, check=False)
        payload = load_plugin(_PAYLOADS, kind, kind="packed kind of grid")
        unpacked: Quantized = payload.unpack(name, {f"{name}_{kind}": stream})
        return unpacked


@dataclass(frozen=True, kw_only=True)
class _Both(Held):
    """Matrices of several kinds, each with the numbers that they have among all."""

    parts: tuple[tuple[Held, list[int]], ...]

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = [(f"part_{place}_", held.tensors) for place, (held, _) in enumerate(self.parts)]
        return {start + name: tensor for start, tensors in named for name, tensor in tensors.items()}

    def on(self, tensors: Mapping[str, Tensor]) -> "_Both":
        moved = []
        for place, (held, numbers) in enumerate(self.parts):
            here = {name: tensors[f"part_{place}_{name}"] for name in held.tensors}
            moved.append((held.on(here), numbers))
        return _Both(parts=tuple(moved))

    def dense(self, groups: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
        numbers = list(itertools.chain(*groups))
        found: dict[int, Tensor] = {}
        for held, own in self.parts:
            inside = {number: place for place, number in enumerate(own)}
            some = [number for number in numbers if number in inside]
            found |= dict(zip(some, held.dense([[inside[number]] for number in some], dtype), strict=True))
        return _joined(groups, found)


def _joined(groups: Sequence[Sequence[int]], found: Mapping[int, Tensor]) -> list[Tensor]:
    """The matrices of each group, one behind the other."""
    return [found[group[0]] if len(group) == 1 else torch.cat([found[number] for number in group]) for group in groups]
