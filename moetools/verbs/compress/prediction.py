"""The KL of a plan from measurements of its single choices on little text.

K = R + B + c sqrt(R B): R the loss of fewer experts, B that of fewer bits (experts and attention, plus embeddings),
each measured alone; c is fitted to plans that were measured with both, for the two do not simply add.

What is fitted to little text loses more than what is fitted to all of it: a refit, and a rounding that looks at its
inputs, have an excess that falls about as 1 / tokens. R and B therefore are those of all the text, see `learned`.
"""

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from moetools.verbs.compress.candidates import Bits, Candidate, width

Number = TypeVar("Number", int, float)
_PROBES = 3
"""Points that a curve is measured at; between them logarithms are interpolated."""
_LEAST = 1e-7
_WIDE = "w8a16"
_FINE = 5.0
"""Integer widths from here on lose next to nothing, by the law of rounding: a quarter with every bit."""
_PER_BIT = 4.0
_REDUCTION, _QUANTIZATION, _GUIDED = 3, 3, 2
JOINT_PASSES = _REDUCTION + _QUANTIZATION + _GUIDED
LEARNING_PASSES = 2 * _REDUCTION + _QUANTIZATION
PLAIN = Bits(experts=None)
BASE = Bits(experts=_WIDE, attention=_WIDE)
"""What attention and embeddings are tried out beside: it loses next to nothing."""


@dataclass(frozen=True)
class Probe:
    """A single choice, or a plan, whose KL is measured on little text."""

    method: str
    experts: int
    bits: Bits

    @property
    def passes(self) -> int:
        """Runs over its text.

        A reduction runs the original once and the new model twice, a quantization the model three times; behind a
        reduction also the original, and the model once more. An embedding or a head that is coded takes another.
        """
        if self.bits.experts is None:
            return _REDUCTION
        bits = _QUANTIZATION + (1 if self.bits.embeddings else 0)
        return bits if self.method == "none" else _REDUCTION + bits + _GUIDED


def probe_of(plan: Candidate) -> Probe:
    """A plan as what can be measured of it."""
    return Probe(plan.method, plan.experts, plan.bits)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicts plans of a model.

    Attributes:
        num_experts: of the original.
        measured: KL of every probe.
        interaction: c.
        reduction: the share of R that is left when all of the text is used, by experts; between them logarithms are
            interpolated.
        rounding: that of B.
    """

    num_experts: int
    measured: Mapping[Probe, float] = field(default_factory=dict)
    interaction: float = 0.0
    reduction: Mapping[int, float] = field(default_factory=dict)
    rounding: float = 1.0

    def single_probes(self, candidates: Sequence[Candidate]) -> list[Probe]:
        """What must be measured to predict all candidates, each choice alone."""
        found: dict[Probe, None] = {}
        for method in sorted({one.method for one in candidates} - {"none"}):
            counts = sorted({one.experts for one in candidates if one.method == method})
            found |= dict.fromkeys(Probe(method, count, PLAIN) for count in _some(counts))
        quantized = [one.bits for one in candidates if one.bits.experts is not None]
        whole = [one for one in quantized if not is_coded(one)]
        fine = sorted((one for one in whole if _is_fine(one)), key=lambda one: width(one.experts))
        found |= dict.fromkeys(self._alone(one) for one in [*(one for one in whole if not _is_fine(one)), *fine[:1]])
        coded = [one for one in quantized if is_coded(one)]
        rates = sorted({width(one.experts) for one in coded})
        found |= dict.fromkeys(self._alone(_coded(rate)) for rate in _some(rates))
        parts = [replace(BASE, attention=one.attention) for one in coded]
        parts += [replace(BASE, embeddings=one.embeddings) for one in coded]
        if coded:
            found |= dict.fromkeys(map(self._alone, (BASE, *parts)))
        return list(found)

    def learning_probes(self) -> list[Probe]:
        """The mildest and the strongest reduction, and the bits in the middle, to be measured on more text."""
        alone = [probe for probe in self.measured if (probe.method == "none") != (probe.bits == PLAIN)]
        fewer = sorted((one for one in alone if one.method != "none"), key=lambda one: (one.experts, one.method))
        bits = sorted((one for one in alone if one.method == "none"), key=self.measured.__getitem__)
        return list(dict.fromkeys([*fewer[:1], *fewer[-1:], *bits[len(bits) // 2 :][:1]]))

    def learned(self, on_more: Mapping[Probe, float], tokens: tuple[int, int, int]) -> "Prediction":
        """The same for all of the text: log K(n) = a + b / n through what two sizes of text give, b not negative.

        Little excess falls as 1 / n by that; much of it, on text that is short for what is fitted, faster at first.

        Args:
            on_more: KL of `learning_probes` on more text.
            tokens: of the little text, of more, and of all.
        """
        little, more, everything = tokens
        found = self
        if not little < more <= everything:
            return found
        reduction: dict[int, float] = {}
        further = (1 / more - 1 / everything) / (1 / little - 1 / more)
        for probe, kl in on_more.items():
            left = min(1.0, max(kl, _LEAST) / max(self.measured[probe], _LEAST)) ** (1 + further)
            if probe.method == "none":
                found = replace(found, rounding=left)
            else:
                reduction[probe.experts] = left
        return replace(found, reduction=reduction)

    def _left(self, experts: int) -> float:
        """The share of R that is left on all of the text, between the numbers of experts that it is known for."""
        known = {math.log(self.num_experts - count): left for count, left in self.reduction.items()}
        if not known:
            return 1.0
        at = math.log(max(1, self.num_experts - experts))
        return _interpolated(known, min(max(at, min(known)), max(known)))

    def joint_probes(self, candidates: Sequence[Candidate], number: int) -> list[Probe]:
        """The most promising plans that join fewer experts and fewer bits."""
        both = [one for one in candidates if one.method != "none" and one.bits.experts is not None]
        return [probe_of(one) for one in sorted(both, key=self.kl)[:number]]

    def fitted(self, joint: Mapping[Probe, float]) -> "Prediction":
        """The same with the interaction that fits the measured plans best: least squares of the relative errors."""
        above = below = 0.0
        for probe, kl in joint.items():
            fewer, bits = self._reduction(probe.method, probe.experts), self._bits(probe.bits)
            cross = math.sqrt(fewer * bits) / max(kl, _LEAST)
            above += cross * (1 - (fewer + bits) / max(kl, _LEAST))
            below += cross**2
        # K stays above what either alone loses.
        interaction = max(-1.0, above / below) if below else 0.0
        return replace(self, interaction=interaction, measured={**self.measured, **joint})

    def kl(self, plan: Candidate) -> float:
        """Predicted KL of a plan that is built on all of the text, nats per token."""
        fewer, bits = self._reduction(plan.method, plan.experts), self._bits(plan.bits)
        whole = self._joined(self._left(plan.experts) * fewer, self.rounding * bits)
        probe, little = probe_of(plan), self._joined(fewer, bits)
        return self.measured[probe] * whole / little if little and probe in self.measured else whole

    def _joined(self, fewer: float, bits: float) -> float:
        return fewer + bits + self.interaction * math.sqrt(fewer * bits)

    def _alone(self, bits: Bits) -> Probe:
        return Probe("none", self.num_experts, bits)

    def _reduction(self, method: str, experts: int) -> float:
        """Of fewer experts alone; log KL is interpolated over the logarithm of the experts that go."""
        if method == "none":
            return 0.0
        known = {
            math.log(self.num_experts - probe.experts): kl
            for probe, kl in self.measured.items()
            if probe.method == method and probe.bits == PLAIN
        }
        return _interpolated(known, math.log(self.num_experts - experts))

    def _bits(self, bits: Bits) -> float:
        """Of fewer bits alone."""
        if bits.experts is None:
            return 0.0
        if not is_coded(bits):
            return self._integers(bits)
        known = {
            width(probe.bits.experts): kl
            for probe, kl in self.measured.items()
            if probe.method == "none" and probe.bits == _coded(width(probe.bits.experts))
        }
        loss, base = _interpolated(known, width(bits.experts)), self._measured(BASE)
        for part in (replace(BASE, attention=bits.attention), replace(BASE, embeddings=bits.embeddings)):
            loss += max(0.0, self._measured(part) - base)
        return loss

    def _integers(self, bits: Bits) -> float:
        """Of whole widths: measured, or by the law of rounding from the least of the fine ones."""
        if self._alone(bits) in self.measured:
            return self._measured(bits)
        fine = {
            width(probe.bits.experts): kl
            for probe, kl in self.measured.items()
            if probe.method == "none" and probe.bits.experts and not is_coded(probe.bits) and _is_fine(probe.bits)
        }
        known, kl = min(fine.items())
        return float(kl * _PER_BIT ** (known - width(bits.experts)))

    def _measured(self, bits: Bits) -> float:
        return self.measured[self._alone(bits)]


def is_coded(bits: Bits) -> bool:
    """Whether the experts are entropy-coded, at any rate."""
    return bits.experts is not None and ":" in bits.experts


def _is_fine(bits: Bits) -> bool:
    return width(bits.experts) >= _FINE


def _coded(rate: float) -> Bits:
    return Bits(experts=f"sub1:{rate:g}", attention=_WIDE)


def _some(values: Sequence[Number]) -> list[Number]:
    """The ends and the middle."""
    if len(values) <= _PROBES:
        return list(values)
    return [values[round(place * (len(values) - 1) / (_PROBES - 1))] for place in range(_PROBES)]


def _interpolated(known: Mapping[float, float], at: float) -> float:
    """exp of the piecewise linear log KL; beyond the ends the last piece goes on."""
    points = sorted(known)
    logs = [math.log(max(known[point], _LEAST)) for point in points]
    if len(points) == 1:
        return math.exp(logs[0])
    right = min(max(bisect(points, at), 1), len(points) - 1)
    share = (at - points[right - 1]) / (points[right] - points[right - 1])
    return math.exp(logs[right - 1] + share * (logs[right] - logs[right - 1]))
