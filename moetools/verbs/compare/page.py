"""The page of `compare`: size against loss as a picture, and the table."""

from moetools.pipeline.page import html_page, html_table
from moetools.pipeline.scatter import Dot, scatter
from moetools.verbs.compare.report import Comparison


def comparison_page(found: Comparison) -> str:
    """The whole page; the reference is not in the picture."""
    dots = [
        Dot(name=model.name, nbytes=model.size.nbytes, loss=model.loss, joined=model.pareto)
        for model in found.models
        if not model.is_reference
    ]
    axis = "KL, nats per token" if found.has_kl else "mean perplexity"
    picture = scatter(dots, axis, "joined: Pareto points")
    return html_page("moetools compare", ["<h1>Comparison</h1>", picture, *map(html_table, found.tables())])
