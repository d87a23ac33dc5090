"""report.html of `route-tasks`: one self-contained page with heat maps, no scripts and nothing to download."""

from collections.abc import Callable, Sequence

from moetools.pipeline.page import html_page, html_table, scrolled
from moetools.printable import in_html
from moetools.verbs.route.report import RouteReport

_CELL, _LABEL, _GAP = 26, 92, 10


def route_page(report: RouteReport) -> str:
    """The whole page."""
    parts = [
        f"<h1>Experts by task: {in_html(report.model_type)}</h1>",
        f"<p>{in_html(report.input_path)}, {report.num_experts} experts, top-{report.top_k}</p>",
        f'<pre tabindex="0" role="group" aria-label="command">{in_html(report.command)}</pre>',
        _quality(report),
        _overlap(report),
        _scores(report),
        _curve(report),
        *map(html_table, report.tables()),
    ]
    return html_page("moetools route-tasks", parts)


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    text: Callable[[float], str] | None = None,
    low: float = 0.0,
    high: float | None = None,
    marked: Sequence[Sequence[bool]] | None = None,
    cell: tuple[int, int] = (_CELL, _CELL),
) -> str:
    """An inline SVG; darker is more, marked cells have a border, and every cell tells its value when pointed at."""
    largest = max((value for row in values for value in row), default=1.0) if high is None else high
    width, height = cell
    size = (_LABEL + width * len(columns) + _GAP, 2 * _CELL + height * len(rows) + _GAP)
    drawn = [f'<text x="0" y="12" font-weight="bold">{in_html(title)}</text>']
    for place, name in enumerate(columns):
        drawn.append(_text(_LABEL + width * (place + 0.5), 2 * _CELL - 8, name, anchor="middle"))
    for line, name in enumerate(rows):
        top = 2 * _CELL + height * line
        drawn.append(_text(_LABEL - 6, top + height / 2 + 4, name, anchor="end"))
        for place, value in enumerate(values[line]):
            shade = min(1.0, max(0.0, (value - low) / (largest - low))) if largest > low else 0.0
            border = ' stroke="#111" stroke-width="1.6"' if marked is not None and marked[line][place] else ""
            left = _LABEL + width * place
            drawn.append(
                f'<rect x="{left + 1}" y="{top + 1}" width="{width - 2}" height="{height - 2}" fill="{_colour(shade)}"'
                f"{border}><title>{in_html(name)}, {in_html(columns[place])}: {value:.4g}</title></rect>"
            )
            if text is not None:
                ink = "#fff" if shade > 0.55 else "#111"
                drawn.append(_text(left + width / 2, top + height / 2 + 4, text(value), anchor="middle", ink=ink))
    return f'<svg width="{size[0]}" height="{size[1]}" role="img" aria-label="{in_html(title)}">{"".join(drawn)}</svg>'


def _text(x: float, y: float, text: str, *, anchor: str, ink: str = "#111") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{ink}" pointer-events="none"'
    return f"<text {place}>{in_html(text)}</text>"


def _colour(shade: float) -> str:
    """White to dark blue."""
    ends = ((247, 251, 255), (8, 48, 107))
    return "#" + "".join(f"{round(start + (end - start) * shade):02x}" for start, end in zip(*ends, strict=True))


def _quality(report: RouteReport) -> str:
    if report.full is None:
        return ""
    full = report.full
    rows = [output.sets.name for output in report.outputs]
    ratio = [
        [output.metrics.tasks[task].perplexity / full.tasks[task].perplexity for task in report.tasks]
        for output in report.outputs
    ]
    marked = [[task in output.sets.tasks for task in report.tasks] for output in report.outputs]
    highest = max(2.0, min(8.0, max(max(row) for row in ratio)))
    picture = heat_map(
        "perplexity over the full model's",
        rows,
        report.tasks,
        ratio,
        text=lambda value: f"{value:.2f}",
        low=1.0,
        high=highest,
        marked=marked,
        cell=(72, _CELL),
    )
    note = "<p class=note>framed: the tasks a checkpoint was made for</p>"
    return f"<h2>On task and off task</h2>{note}{scrolled(picture, 'perplexity')}"


def _overlap(report: RouteReport) -> str:
    if report.overlap is None:
        return ""
    maps = "".join(
        heat_map(
            f"layer {layer}",
            report.overlap.tasks,
            report.overlap.tasks,
            matrix,
            text=lambda value: f"{value:.2f}",
            high=1.0,
            cell=(64, _CELL),
        )
        for layer, matrix in report.overlap.layers.items()
    )
    return f"<h2>Overlap of the tasks' experts (Jaccard)</h2>{scrolled(maps, 'overlap of the experts')}"


def _scores(report: RouteReport) -> str:
    chosen = [output.sets for output in report.outputs if len(output.sets.tasks) == 1]
    columns = [str(expert) for expert in range(report.num_experts)]
    maps = []
    for layer, rows in report.scores.items():
        share = [[value / (sum(row) or 1.0) for value in row] for row in rows]
        marked = [[expert in one.experts[layer] for expert in range(report.num_experts)] for one in chosen]
        maps.append(heat_map(f"layer {layer}", report.tasks, columns, share, marked=marked))
    return (
        f"<h2>Score of every expert ({in_html(str(report.options['score']))}, share of the layer's total)</h2>"
        f"<p class=note>framed: the experts of the task</p>{scrolled(''.join(maps), 'scores of the experts')}"
    )


def _curve(report: RouteReport) -> str:
    if len(report.curve) < 2:
        return ""
    width, height, left = 520, 240, 60
    most = report.curve[-1]
    points = [
        (
            left + (width - left - 20) * point.experts / most.experts,
            20 + (height - 60) * (1 - point.nbytes / most.nbytes),
        )
        for point in report.curve
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#08306b"><title>{point.experts} experts: '
        f"{point.nbytes / 1e6:,.2f} MB, {point.parameters:,} parameters</title></circle>"
        f'<text x="{x:.1f}" y="{height - 18}" text-anchor="middle">{point.experts}</text>'
        for (x, y), point in zip(points, report.curve, strict=True)
        if len(report.curve) <= 16 or point.experts in (report.curve[0].experts, most.experts)
    )
    labels = (
        f'<text x="{left - 6}" y="24" text-anchor="end">{most.nbytes / 1e6:,.1f} MB</text>'
        f'<text x="{left - 6}" y="{height - 36}" text-anchor="end">0</text>'
        f'<text x="{(left + width) / 2}" y="{height - 2}" text-anchor="middle">experts per layer</text>'
    )
    picture = (
        f'<svg width="{width}" height="{height}" role="img" aria-label="bytes over experts">'
        f'<polyline points="{line}" fill="none" stroke="#08306b" stroke-width="2"/>{dots}{labels}</svg>'
    )
    return f"<h2>Memory</h2>{scrolled(picture, 'bytes over experts')}"
