"""The page of `compress`: every plan that fits, predicted and measured, and the one that was taken."""

from collections.abc import Iterator

from moetools.pipeline.page import html_page, html_table
from moetools.pipeline.scatter import Dot, scatter
from moetools.verbs.compare.report import pareto_points
from moetools.verbs.compress.report import CompressReport, RatedPlan


def frontier_page(report: CompressReport) -> str:
    """The whole page."""
    frontier = pareto_points([(one.plan.nbytes, one.predicted) for one in report.plans])
    pairs = zip(report.plans, frontier, strict=True)
    dots = [dot for one, joined in pairs for dot in _dots(one, joined=joined)]
    note = "hollow: predicted, filled: built and measured, named: what was taken; joined: predicted Pareto points"
    parts = ["<h1>Compress</h1>", scatter(dots, "KL, nats per token", note), *map(html_table, report.tables())]
    return html_page("moetools compress", parts)


def _dots(one: RatedPlan, *, joined: bool) -> Iterator[Dot]:
    name = one.words()
    yield Dot(
        name=f"{name}, predicted",
        nbytes=one.plan.nbytes,
        loss=one.predicted,
        joined=joined,
        hollow=True,
        labelled=one.chosen and one.measured is None,
    )
    yield Dot(name=name, nbytes=one.file_bytes or one.plan.nbytes, loss=one.measured, labelled=one.chosen)
