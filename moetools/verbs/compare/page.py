"""The page of `compare`: size against loss as a picture, and the table."""

import math
from collections.abc import Sequence

from moetools.pipeline.page import html_page, html_table
from moetools.printable import in_html
from moetools.verbs.compare.report import ComparedModel, Comparison

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _EDGE = 720, 360, 70, 140, 30
_LEAST = 1e-5
"""A KL below it is drawn as this much: the axis is logarithmic."""


def comparison_page(found: Comparison) -> str:
    """The whole page."""
    parts = ["<h1>Comparison</h1>", _picture(found), *map(html_table, found.tables())]
    return html_page("moetools compare", parts)


def _picture(found: Comparison) -> str:
    """Every model but the reference at (bytes, loss), the Pareto points joined."""
    models = [model for model in found.models if not model.is_reference and _drawable(model)]
    if not models:
        return ""
    place = _Scale(models)
    frontier = sorted((place.x(model), place.y(model)) for model in models if model.pareto)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in frontier)
    axis = "KL, nats per token" if found.has_kl else "mean perplexity"
    return (
        f"<h2>Size and loss</h2><p class=note>{axis} over MB, logarithmic upwards; joined: Pareto points</p>"
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{axis} over MB">'
        f'<polyline points="{line}" fill="none" stroke="#08306b" stroke-width="1.5"/>'
        f"{''.join(_dot(model, place) for model in models)}{place.labels()}</svg>"
    )


def _drawable(model: ComparedModel) -> bool:
    return model.loss is not None and math.isfinite(model.loss)


def _dot(model: ComparedModel, place: "_Scale") -> str:
    x, y = place.x(model), place.y(model)
    fill = "#08306b" if model.pareto else "#c0c8d4"
    said = f"{in_html(model.name)}: {model.size.nbytes / 1e6:,.2f} MB, {model.loss:.4g}"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}"><title>{said}</title></circle>'
        f'<text x="{x + 9:.1f}" y="{y + 4:.1f}">{in_html(model.name)}</text>'
    )


class _Scale:
    """Where a model lies in the picture."""

    def __init__(self, models: Sequence[ComparedModel]) -> None:
        self._most = max(model.size.nbytes for model in models)
        losses = [self._log(model) for model in models]
        # One model alone lies in the middle.
        self._low, self._high = min(losses) - 0.1, max(losses) + 0.1

    @staticmethod
    def _log(model: ComparedModel) -> float:
        assert model.loss is not None
        return math.log10(max(model.loss, _LEAST))

    def x(self, model: ComparedModel) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * model.size.nbytes / self._most

    def y(self, model: ComparedModel) -> float:
        return self._height(self._log(model))

    def _height(self, log: float) -> float:
        return _EDGE + (_HEIGHT - 2 * _EDGE) * (self._high - log) / (self._high - self._low)

    def labels(self) -> str:
        sides = "".join(
            f'<text x="{_LEFT - 8}" y="{self._height(log) + 4:.1f}" text-anchor="end">{10**log:.3g}</text>'
            for log in (self._low, (self._low + self._high) / 2, self._high)
        )
        right = f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">{self._most / 1e6:,.1f} MB</text>'
        return f'{sides}<text x="{_LEFT}" y="{_HEIGHT - 6}">0</text>{right}'
