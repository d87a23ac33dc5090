"""A picture of sizes against losses for a page: no scripts, values shown by hovering, everything escaped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moetools.pipeline.page import scrolled
from moetools.printable import in_html

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _EDGE = 720, 360, 70, 140, 30
_LEAST = 1e-5
"""A loss below it is drawn as this much: the axis is logarithmic."""
_LETTER = 6
_DARK, _PALE = "#08306b", "#c0c8d4"


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One model or plan.

    Attributes:
        loss: positive; what is not finite is left out.
        joined: the dark ones are joined by a line, from the smallest to the largest.
        hollow: a guess, not a measurement.
        labelled: its name stands beside it; it is shown by hovering in any case.
    """

    name: str
    nbytes: int
    loss: float | None
    joined: bool = False
    hollow: bool = False
    labelled: bool = True


def scatter(dots: Sequence[Dot], axis: str, note: str) -> str:
    """Every dot at (bytes, loss); nothing where there is none.

    Args:
        axis: what the loss is.
        note: what the line and the kinds of dots mean.
    """
    drawn = [dot for dot in dots if dot.loss is not None and math.isfinite(dot.loss)]
    if not drawn:
        return ""
    place = _Scale(drawn)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted((place.x(dot), place.y(dot)) for dot in drawn if dot.joined))
    title = f"{in_html(axis)} over MB"
    picture = (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{title}">'
        f'<text x="0" y="12" font-weight="bold">{title}</text>'
        f'<polyline points="{line}" fill="none" stroke="{_DARK}" stroke-width="1.5"/>'
        f"{''.join(_drawn(dot, place) for dot in drawn)}{place.labels()}</svg>"
    )
    said = f"<p class=note>{title}, logarithmic upwards; {in_html(note)}</p>"
    return f"<h2>Size and loss</h2>{said}{scrolled(picture, title)}"


def _drawn(dot: Dot, place: "_Scale") -> str:
    x, y, colour = place.x(dot), place.y(dot), _DARK if dot.joined else _PALE
    fill = f'fill="none" stroke="{colour}" stroke-width="2"' if dot.hollow else f'fill="{colour}"'
    said = f"{in_html(dot.name)}: {dot.nbytes / 1e6:,.2f} MB, {dot.loss:.4g}"
    # A name that would leave the picture stands on the left.
    left = x + 9 + _LETTER * len(dot.name) > _WIDTH
    at = f'x="{x - 9:.1f}" text-anchor="end"' if left else f'x="{x + 9:.1f}"'
    label = f'<text {at} y="{y + 4:.1f}">{in_html(dot.name)}</text>' if dot.labelled else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {fill}><title>{said}</title></circle>{label}'


class _Scale:
    """Where a dot lies in the picture."""

    def __init__(self, dots: Sequence[Dot]) -> None:
        self._most = max(dot.nbytes for dot in dots)
        losses = [self._log(dot) for dot in dots]
        # One dot alone lies in the middle.
        self._low, self._high = min(losses) - 0.1, max(losses) + 0.1

    @staticmethod
    def _log(dot: Dot) -> float:
        assert dot.loss is not None
        return math.log10(max(dot.loss, _LEAST))

    def x(self, dot: Dot) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * dot.nbytes / self._most

    def y(self, dot: Dot) -> float:
        return self._height(self._log(dot))

    def _height(self, log: float) -> float:
        return _EDGE + (_HEIGHT - 2 * _EDGE) * (self._high - log) / (self._high - self._low)

    def labels(self) -> str:
        sides = "".join(
            f'<text x="{_LEFT - 8}" y="{self._height(log) + 4:.1f}" text-anchor="end">{10**log:.3g}</text>'
            for log in (self._low, (self._low + self._high) / 2, self._high)
        )
        right = f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">{self._most / 1e6:,.1f} MB</text>'
        return f'{sides}<text x="{_LEFT}" y="{_HEIGHT - 6}">0</text>{right}'
