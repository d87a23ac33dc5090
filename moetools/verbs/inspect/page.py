"""The page of `inspect-routing`: advice, load of every expert as pictures, trees of alike experts, all tables."""

from collections.abc import Iterator, Sequence

from moetools.pipeline.page import html_page, html_table, scrolled
from moetools.pipeline.table import Table
from moetools.printable import in_html
from moetools.verbs.inspect.routing_report import RoutingReport
from moetools.verbs.inspect.similarity import Join
from moetools.verbs.route.html import heat_map

_CELLS = 16_000
"""Cells of all heat maps together: the tasks' own are left out of a page that would get too large."""
_CELL = (22, 22)
_MOST_BRACKETS = 2048
"""Experts of all layers: a larger model gets the tree that merging cuts alone, or the page would not stay small."""
_HOT = 4.0
_PANELS = '<div class="panels">'
_STEP, _HEIGHT, _EDGE, _LEAF = 16, 130, 14, 18


def routing_page(report: RoutingReport) -> str:
    """The whole page."""
    advice, *tables = report.tables()
    said = "".join(f"<li><b>{in_html(about)}</b>: {in_html(text)}</li>" for about, text in advice.rows)
    parts = [
        f"<h1>Routing of {in_html(report.model)}</h1>",
        f"<h2>Advice</h2><ul>{said}</ul><p class=note>{in_html(advice.note)}</p>",
        *_loads(report),
        *_trees(report),
        *map(html_table, tables),
    ]
    return html_page("moetools inspect-routing", parts)


def _loads(report: RoutingReport) -> Iterator[str]:
    """Load of every expert of every layer, over all tasks and per task, each with its table behind it."""
    experts = report.num_experts
    tasks = list(report.layers[0].tasks)
    maps = {"all": [layer.pooled.share for layer in report.layers]}
    if len(tasks) > 1 and (1 + len(tasks)) * experts * len(report.layers) <= _CELLS:
        maps |= {task: [layer.tasks[task].share for layer in report.layers] for task in tasks}
    yield "<h2>Load</h2><p class=note>times the even share; a cell tells its value when pointed at</p>" + _PANELS
    columns, rows = list(map(str, range(experts))), [f"layer {layer.index}" for layer in report.layers]
    for name, share in maps.items():
        load = [[experts * one for one in row] for row in share]
        title = "all tasks" if name == "all" else f"task {name}"
        picture = heat_map(title, rows, columns, load, high=min(_HOT, float(experts)), cell=_CELL)
        cells = [[row, *(f"{one:.2f}" for one in line)] for row, line in zip(rows, load, strict=True)]
        table = Table(title=f"load, {title}", columns=["", *columns], rows=cells, note="times the even share")
        yield _panel(picture, in_html(title), table)
    yield "</div>"


def _trees(report: RoutingReport) -> Iterator[str]:
    """A dendrogram per layer, if experts were compared."""
    found = [(layer.index, layer.similarity) for layer in report.layers if layer.similarity is not None]
    if not found:
        return
    measures = {"mean outputs": "as merge-experts with the method hc-smoe; height: Euclidean distance"}
    if len(found) * report.num_experts <= _MOST_BRACKETS:
        measures |= dict.fromkeys(found[0][1].trees, "height: 1 less the similarity")
    yield "<h2>Experts that are alike</h2>"
    for measure, note in measures.items():
        yield f"<h3>By {measure}</h3><p class=note>average linkage, {note}</p>{_PANELS}"
        for index, similarity in found:
            title = f"layer {index}, by {measure}"
            joins = similarity.trees.get(measure, similarity.joins)
            yield _panel(dendrogram(title, joins, report.num_experts), title, _joins_table(title, joins))
        yield "</div>"


def _joins_table(title: str, joins: Sequence[Join]) -> Table:
    rows = [[" ".join(map(str, join.left)), " ".join(map(str, join.right)), f"{join.distance:.4g}"] for join in joins]
    return Table(title=f"joins of {title}", columns=["experts", "join experts", "at distance"], rows=rows)


def dendrogram(title: str, joins: Sequence[Join], experts: int) -> str:
    """An inline SVG: experts below, every join a bracket at its distance, which it tells when pointed at."""
    order = _leaves(joins, experts)
    highest = max((join.distance for join in joins), default=0.0) or 1.0
    floor = _EDGE + _LEAF + _HEIGHT
    # Of a cluster, by its least expert: the middle of its bracket, and its height.
    tops = {expert: (_EDGE + _STEP * (place + 0.5), float(floor)) for place, expert in enumerate(order)}
    drawn = [f'<text x="0" y="12" font-weight="bold">{in_html(title)}</text>']
    for join in joins:
        (x, y), (other_x, other_y) = tops[min(join.left)], tops[min(join.right)]
        top = floor - _HEIGHT * join.distance / highest
        said = f"{' '.join(map(str, join.left))} + {' '.join(map(str, join.right))}: {join.distance:.4g}"
        drawn.append(
            f'<path d="M{x:.1f} {y:.1f}V{top:.1f}H{other_x:.1f}V{other_y:.1f}" fill="none" stroke="#08306b" '
            f'stroke-width="1.5"><title>{in_html(said)}</title></path>'
        )
        tops[min(*join.left, *join.right)] = ((x + other_x) / 2, top)
    for place, expert in enumerate(order):
        left = _EDGE + _STEP * (place + 0.5)
        drawn.append(f'<text x="{left:.1f}" y="{floor + 12}" text-anchor="middle" font-size="9">{expert}</text>')
    width, height = 2 * _EDGE + _STEP * experts, floor + _LEAF
    label = in_html(f"tree of alike experts, {title}")
    return f'<svg width="{width}" height="{height}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'


def _leaves(joins: Sequence[Join], experts: int) -> list[int]:
    """Experts in an order in which no two brackets cross: the members of a cluster stand together."""
    order = {expert: [expert] for expert in range(experts)}
    for join in joins:
        left, right = order.pop(min(join.left)), order.pop(min(join.right))
        order[min(*join.left, *join.right)] = left + right
    return [expert for first in sorted(order) for expert in order[first]]


def _panel(picture: str, label: str, table: Table) -> str:
    return f"<div>{scrolled(picture, label)}{_behind(table)}</div>"


def _behind(table: Table) -> str:
    return f"<details><summary>as a table</summary>{html_table(table)}</details>"
