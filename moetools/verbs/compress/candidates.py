"""Every plan that fits into a byte budget: experts, how they are reduced, and the scheme of every part.

Bytes are arithmetic on config.json and headers; nothing here reads a weight.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moetools.architectures.base import find_architecture
from moetools.errors import UserError
from moetools.formats.reader import open_model
from moetools.forward.options import ForwardOptions
from moetools.grids.entropy import EntropyGrid, overhead_bits
from moetools.text.options import DataOptions
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.quantize.work import QuantizedModel

PLAIN_BITS = 16.0
_PER_EXPERT = ("experts", "router")
METHODS = ("prune", "merge")
_STOCK = ("w8a16", "w6a16", "w5a16", "w4a16", "w3a16", "w2a16")
_VLLM = ("w8a16", "w4a16")
_CODED_ATTENTION = ("w8a16", "sub1:4", "sub1:3")
_CODED_EMBEDDINGS = (None, "w8a16", "sub1:4", "sub1:3")
_CODED_LEAST, _CODED_MOST, _PROBED_RATE = 0.4, 5.0, 2.0
_CODED_OVERHEAD = 0.7
_CODED_MARGIN = 0.985
"""Share of the room that entropy-coded experts are meant to fill: their rate is met within about 1 %."""
_HEADER_ENTRY = 84
"""Bytes of a tensor's entry in a header beside its name, at most: suffix, dtype, shape, two offsets."""
_ENTRIES = {"pack-quantized": 3, "moetools": 1}


@dataclass(frozen=True, kw_only=True)
class Bits:
    """The scheme of every part.

    Attributes:
        experts: of routed and shared experts; None: no part is quantized.
        attention: None: as the experts.
        embeddings: None: plain.
    """

    experts: str | None
    attention: str | None = None
    embeddings: str | None = None

    def options(self) -> dict[str, Any]:
        """Options of `quantize`."""
        assert self.experts is not None
        scheme, _, rate = self.experts.partition(":")
        asked = {"scheme": scheme, "bits": float(rate) if rate else None}
        parts = {"attention": self.attention, "embeddings": self.embeddings}
        return {name: value for name, value in {**asked, **parts}.items() if value is not None}

    def widths(self) -> tuple[float, float, float]:
        """Bits of experts, attention and embeddings."""
        if self.experts is None:
            return PLAIN_BITS, PLAIN_BITS, PLAIN_BITS
        return width(self.experts), width(self.attention or self.experts), width(self.embeddings)

    def words(self) -> str:
        """In a table."""
        if self.experts is None:
            return "plain"
        parts = [self.experts, self.attention and f"attention {self.attention}"]
        return ", ".join(filter(None, [*parts, self.embeddings and f"embeddings {self.embeddings}"]))


def width(scheme: str | None) -> float:
    """Bits per weight that a scheme stands for."""
    if scheme is None:
        return PLAIN_BITS
    name, _, rate = scheme.partition(":")
    return float(rate) if rate else float(name[1])


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to fit.

    Attributes:
        method: "none", "prune" (REAP with the joint refit) or "merge" (joint).
        experts: that every layer keeps.
        nbytes: of the weight files.
    """

    method: str
    experts: int
    bits: Bits
    nbytes: int

    def beats(self, other: "Candidate") -> bool:
        """At least as many experts and bits everywhere, and more somewhere: nothing speaks for the other one."""
        if self.method not in ("none", other.method):
            return False
        mine, theirs = (self.experts, *self.bits.widths()), (other.experts, *other.bits.widths())
        return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))

    def words(self) -> str:
        """In a line."""
        kept = "all experts" if self.method == "none" else f"{self.method} to {self.experts}"
        return f"{kept}, {self.bits.words()}"


@dataclass(frozen=True, kw_only=True)
class PartSizes:
    """Bytes of a choice of schemes.

    Attributes:
        beside: of all that is no routed expert and no router.
        expert: of one expert of every layer, with its router rows.
        expert_weights: numbers in that.
        least_rate: bits per weight below which entropy coding of the experts does not pay; 0 where they are not coded.
    """

    beside: int
    expert: int
    expert_weights: int
    least_rate: float

    def at(self, experts: int) -> int:
        """With so many experts in every layer."""
        return self.beside + self.expert * experts


class Sizes:
    """Bytes of every plan of a model.

    Args:
        target: see `CompressOptions`.
        min_experts: that every layer keeps at least.

    Raises:
        CheckpointError, UnsupportedModelError: the model cannot be handled.
    """

    def __init__(self, model: Path, forward: ForwardOptions, target: str, min_experts: int) -> None:
        self.path, self.forward, self.target, self.min_experts = model, forward, target, min_experts
        self.source = open_model(model)
        self.arch = find_architecture(self.source.config)
        count = self.arch.num_experts(self.source.config)
        assert count is not None
        self.num_experts = count
        self._known: dict[Bits, PartSizes | None] = {}

    @property
    def file_bytes(self) -> int:
        """Of the original's weight files."""
        return sum(header.file_bytes for header in self.source.headers.values())

    def counts(self) -> list[int]:
        """Legal numbers of experts below the model's own, most first; one alone is another, dense model."""
        legal = self.arch.legal_counts(self.source.config)
        return [count for count in reversed(legal) if max(2, self.min_experts) <= count < self.num_experts]

    def fitting(self, budget: int) -> list[Candidate]:
        """Every plan within the budget that no other one beats, the largest first.

        Raises:
            UserError: none, naming the smallest.
        """
        found = [one for one in self._all(budget) if one.nbytes <= budget]
        if not found:
            least = min(one.nbytes for one in self._all(0))
            other = "" if self.target == "packed" else ", or `target=packed`, which codes embeddings too"
            raise UserError(
                f"no plan for {self.target} fits into {budget:,} bytes; the smallest takes {least:,}",
                hint=f"a larger `target_size`{other}",
            )
        best = [one for one in found if not any(other.beats(one) for other in found)]
        return sorted(best, key=lambda one: (-one.nbytes, one.words()))

    def parts(self, bits: Bits) -> PartSizes | None:
        """None where no loader of the target reads these schemes."""
        if bits not in self._known:
            self._known[bits] = self._measured(bits)
        return self._known[bits]

    def _measured(self, bits: Bits) -> PartSizes | None:
        if bits.experts is None:
            return self._total({}, 0.0)
        loader = "vllm" if self.target == "vllm" else "transformers"
        options = QuantizeOptions(method="rtn", target=loader, **bits.options())
        options.check()
        try:
            work = QuantizedModel(self.path, DataOptions(), self.forward, options, command="", progress=None)
        except UserError:
            return None
        if self.target == "transformers" and not work.stock:
            return None
        return self._total(self._stored(work), _least_rate(work, bits))

    def _stored(self, work: QuantizedModel) -> dict[str, int]:
        """Bytes of every packed tensor with its entries in a header."""
        entries, stored = _ENTRIES.get(work.format.name, 2), {}
        for place in work.plan.everything:
            shape = self.source.tensors[place.name].shape
            each = work.format.stored_bytes(work.plan.grids[place.name], *place.shape)
            count = shape[0] if len(shape) == 3 else 1
            stored[place.name] = count * (each + entries * (len(place.name) + _HEADER_ENTRY))
        return stored

    def _total(self, stored: Mapping[str, int], least_rate: float) -> PartSizes:
        beside, experts, weights = _HEADER_ENTRY, 0, 0
        for name, info in self.source.tensors.items():
            part = self.arch.part_of(name)
            nbytes = stored.get(name, info.nbytes + len(name) + _HEADER_ENTRY)
            weights += math.prod(info.shape) if part == "experts" else 0
            experts, beside = (experts + nbytes, beside) if part in _PER_EXPERT else (experts, beside + nbytes)
        each = -(-experts // self.num_experts)
        return PartSizes(beside=beside, expert=each, expert_weights=weights // self.num_experts, least_rate=least_rate)

    def _all(self, budget: int) -> Iterator[Candidate]:
        """Everything for the target; entropy-coded experts as large as the budget lets them be, or their smallest."""
        for experts in (self.num_experts, *self.counts()):
            found = [(bits, parts.at(experts)) for bits in self._stock() if (parts := self.parts(bits)) is not None]
            if self.target == "packed":
                found += self._coded(budget, experts)
            for method in ("none",) if experts == self.num_experts else METHODS:
                yield from (Candidate(method=method, experts=experts, bits=bits, nbytes=size) for bits, size in found)

    def _stock(self) -> Iterator[Bits]:
        yield Bits(experts=None)
        for scheme in _VLLM if self.target == "vllm" else _STOCK:
            yield Bits(experts=scheme)
            if self.target == "transformers":
                wider = [one for one in ("w8a16", "w4a16") if width(one) > width(scheme)]
                yield from (Bits(experts=scheme, attention=one) for one in wider)

    def _coded(self, budget: int, experts: int) -> Iterator[tuple[Bits, int]]:
        for attention, embeddings in itertools.product(_CODED_ATTENTION, _CODED_EMBEDDINGS):
            bits = Bits(experts=f"sub1:{_PROBED_RATE:g}", attention=attention, embeddings=embeddings)
            parts = self.parts(bits)
            if parts is None:
                continue
            per_bit = parts.expert_weights * experts / 8
            room = (budget - parts.at(experts)) / per_bit + _PROBED_RATE
            least = max(_CODED_LEAST, parts.least_rate)
            rate = math.floor(100 * min(_CODED_MOST, max(_CODED_MARGIN * room, least if budget == 0 else 0.0))) / 100
            if rate >= least:
                size = parts.at(experts) + int((rate - _PROBED_RATE) * per_bit)
                yield replace(bits, experts=f"sub1:{rate:g}"), size


def _least_rate(work: QuantizedModel, bits: Bits) -> float:
    """Bits per weight at which `_CODED_OVERHEAD` of an expert's matrix would be header, lanes and exponents."""
    assert bits.experts is not None
    found = [0.0]
    for place in work.plan.everything:
        grid = work.plan.grids[place.name]
        if isinstance(grid, EntropyGrid):
            overhead = overhead_bits(*place.shape) / math.prod(place.shape) / _CODED_OVERHEAD
            if place.expert is not None:
                found.append(overhead * width(bits.experts) / grid.rate)
            elif overhead > grid.rate:
                return math.inf
    return max(found)
