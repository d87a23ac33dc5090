"""The page of inspect-routing: pictures that show the numbers, nothing from elsewhere, bounded for large models."""

import base64
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scipy.cluster.hierarchy import linkage

from moetools.errors import UserError
from moetools.forward.calibrate import ModelStatistics, Provenance, load_statistic
from moetools.forward.options import ForwardOptions
from moetools.printable import in_html
from moetools.statistics.base import LayerShape
from moetools.text.options import DataOptions
from moetools.verbs.inspect.options import RoutingOptions
from moetools.verbs.inspect.page import dendrogram, routing_page
from moetools.verbs.inspect.routing import MORE, NEEDS, inspect_routing
from moetools.verbs.inspect.routing_report import routing_report
from moetools.verbs.inspect.similarity import SIMILARITY_NEEDS, _tree

CPU = ForwardOptions(device="cpu", dtype="float32")


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    file = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (6, 16), generator=torch.Generator().manual_seed(0))}, file)
    return file


def assert_one_script(page: str) -> None:
    """The page's own, which its policy knows by its digest."""
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert page.count("<script") == 1
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page


def test_the_page_shows_the_report(tiny: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text = DataOptions(data=[f"a={ids}", f"b={ids}"], seq_len=16)
    options = RoutingOptions(html=page, similarity=True)
    report = inspect_routing(tiny("mixtral"), options, text, CPU)
    written = page.read_text()
    assert_one_script(written)
    assert "http" not in re.sub(r"http-equiv", "", written)
    assert "src=" not in written
    for svg in re.findall(r"<svg.*?</svg>", written, flags=re.DOTALL):
        ET.fromstring(svg)
    for layer in report.layers:
        for expert, share in enumerate(layer.pooled.share):
            assert f"<title>layer {layer.index}, {expert}: {8 * share:.4g}</title>" in written
        for measure in ("mean outputs", "gated outputs", "router logits", "weights", "router rows"):
            assert f'aria-label="tree of alike experts, layer {layer.index}, by {measure}"' in written
    for table in report.tables():
        assert all(in_html(cell) in written for row in table.rows for cell in row[:1])
    hostile = "<script>&me"
    renamed = tuple(replace(one, tasks={hostile: one.tasks["a"], "b": one.tasks["b"]}) for one in report.layers)
    shown = routing_page(replace(report, model=hostile, layers=renamed))
    assert hostile not in shown
    assert shown.count("&lt;script&gt;&amp;me") > 5
    with pytest.raises(UserError, match=r"does not end in \.html"):
        inspect_routing(tmp_path / "none", RoutingOptions(html=tmp_path / "page"), text, CPU)


def test_brackets_stand_at_their_distances_and_never_cross() -> None:
    mean_ED = torch.randn(13, 4, generator=torch.Generator().manual_seed(1)).double()
    joins = _tree(torch.cdist(mean_ED, mean_ED), 0)
    svg = ET.fromstring(dendrogram("t", joins, 13))
    numbers = [[float(one) for one in re.findall(r"[\d.]+", path.attrib["d"])] for path in svg.iter("path")]
    heights = linkage(mean_ED.numpy(), method="average")[:, 2]
    tops = [top for _, _, top, _, _ in numbers]
    assert tops == pytest.approx([162 - 130 * height / max(heights) for height in heights], abs=0.06)
    spans = [sorted((x, other)) for x, _, _, other, _ in numbers]
    for (low, high), top in zip(spans, tops, strict=True):
        for x, y, upper, other_x, other_y in numbers:
            for leg, foot in ((x, y), (other_x, other_y)):
                assert not (low + 0.1 < leg < high - 0.1 and upper < top - 0.1 < foot - 0.2), "a leg crosses a bracket"


def test_a_large_model_makes_a_page_below_5_mb() -> None:
    shape = LayerShape(
        num_experts=128, top_k=8, hidden_size=16, expert_size=4, num_tasks=5, num_sequences=50, num_words=257
    )
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for index in range(48):
        names = (*NEEDS, *MORE, *SIMILARITY_NEEDS)
        states = {name: load_statistic(name).init(shape, torch.device("cpu")) for name in names if name != "word_use"}
        slots_SE = torch.randint(0, 200, (50, 128), generator=generator)
        task_S = torch.arange(50) % 5
        states["sequence_load"] = {"slots": slots_SE, "task": task_S}
        load_GE = torch.zeros(5, 128).long().index_add_(0, task_S, slots_SE)
        states["load"] = {"slots": load_GE, "tokens": load_GE.sum(1) // 8}
        states["mean_output"]["total"] = torch.randn(128, 16, generator=generator).double()
        states["mean_output"]["slots"] += 1
        layers[index] = states
    provenance = Provenance(model="m", data="d", tasks=tuple("abcde"), dtype="bfloat16", num_tokens=1)
    page = routing_page(routing_report(ModelStatistics(provenance=provenance, shape=shape, layers=layers), "large"))
    assert len(page.encode()) < 5e6
    assert page.count("<svg") == 1 + 48
