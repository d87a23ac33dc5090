"""`plots`: the pictures of a page as files, whatever tasks are called, or one error and nothing on disk."""

import struct
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moetools
from moetools.errors import CheckpointError, UserError
from moetools.pipeline.plots import pictures, write_shown
from moetools.verbs.route.html import heat_map

pytest.importorskip("vl_convert")
HOSTILE = "</svg><script>alert('x')</script>"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    file = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (16, 16), generator=torch.Generator().manual_seed(0))}, file)
    return file


def texts(element: ET.Element) -> list[str]:
    return [one.text or "" for one in element.iter(f"{SVG}text")]


def png_size(file: Path) -> tuple[int, int]:
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Of every picture, whose PNG has twice the numbers of its SVG."""
    found = {}
    for svg in sorted(folder.glob("*.svg")):
        root = ET.parse(svg).getroot()
        assert root.tag == f"{SVG}svg"
        found[svg.stem] = (int(root.attrib["width"]), int(root.attrib["height"]))
        width, height = found[svg.stem]
        assert png_size(svg.with_suffix(".png")) == (2 * width, 2 * height)
    assert {file.stem for file in folder.iterdir()} == set(found)
    return found


def test_routing_has_a_picture_per_task_and_tree(tiny, ids, tmp_path):
    plots = tmp_path / "plots"
    data = [f"code={ids}", f"prose={ids}"]
    moetools.inspect_routing(tiny("mixtral"), data=data, seq_len=16, similarity=True, plots=plots, device="cpu")
    names = set(sizes(plots))
    assert {"all-tasks", "task-code", "task-prose"} <= names
    assert any(name.startswith("tree-of-alike-experts-layer-0") for name in names)
    assert "layer 0" in texts(ET.parse(plots / "task-code.svg").getroot())


def test_every_verb_that_draws_writes_what_its_page_shows(tiny, ids, tmp_path):
    model, text = tiny("mixtral"), f"code={ids}"
    asked = {"data": text, "seq_len": 16, "device": "cpu"}
    moetools.compare([model], reference=model, html=tmp_path / "c.html", plots=tmp_path / "compared", **asked)
    drawn = dict(pictures((tmp_path / "c.html").read_text()))
    assert drawn
    assert set(sizes(tmp_path / "compared")) == set(drawn)
    other = tmp_path / "prose.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (16, 16), generator=torch.Generator().manual_seed(1))}, other)
    routed = {"keep": 4, "refit": "none", "verify": False, "data": [text, f"prose={other}"]}
    moetools.route_tasks(model, tmp_path / "out", plots=tmp_path / "routed", **{**asked, **routed})
    drawn = dict(pictures((tmp_path / "out" / "report.html").read_text()))
    assert len(drawn) > 2
    assert set(sizes(tmp_path / "routed")) == set(drawn)


def test_hostile_and_equal_names_are_shown_as_text():
    page = heat_map(HOSTILE, [HOSTILE], ["a & b"], [[1.0]]) + heat_map(HOSTILE, ["r"], ["c"], [[1.0]])
    (first, svg), (second, _) = pictures(page)
    assert HOSTILE in texts(ET.fromstring(svg))
    assert first == "svg-script-alert-x-script"
    assert second == f"{first}-2"


def test_long_names_fit_a_file_system():
    ((name, _),) = pictures(heat_map("任" * 500, ["r"], ["c"], [[1.0]]))
    assert len(name.encode()) < 200


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda plots: plots.write_text("mine"), "is a file"),
        (lambda plots: (plots.mkdir(), (plots / "mine").write_text("mine")), "not empty"),
        (None, "is missing or cannot be written to"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_read(make, said, ids, tmp_path):
    plots = tmp_path / "plots"
    if make is None:
        plots = tmp_path / "absent" / "plots"
    else:
        make(plots)
    for refused in (
        lambda: moetools.inspect_routing(tmp_path / "no model", data=f"a={ids}", plots=plots),
        lambda: moetools.compare([tmp_path / "no", tmp_path / "model"], plots=plots),
        lambda: moetools.route_tasks(tmp_path / "no model", tmp_path / "out", data=f"a={ids}", plots=plots),
    ):
        with pytest.raises(UserError, match=said):
            refused()


def test_without_the_extra_there_is_a_hint(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="vl-convert-python") as raised:
        moetools.compare([tmp_path / "no", tmp_path / "model"], plots=tmp_path / "plots")
    assert "moetools[plots]" in str(raised.value.hint)


def test_a_failing_disk_leaves_nothing(monkeypatch, tmp_path):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moetools.pipeline.plots.sync_tree", fail)
    page = heat_map("load", ["r"], ["c"], [[1.0]])
    with pytest.raises(CheckpointError, match="No space left"):
        write_shown(None, tmp_path / "plots", lambda: page)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_and_a_killed_runs_rest_are_replaced(tmp_path):
    plots = tmp_path / "plots"
    plots.mkdir()
    (tmp_path / ".plots.partial").mkdir()
    (tmp_path / ".plots.partial" / "old.svg").write_text("old")
    write_shown(None, plots, lambda: heat_map("load", ["r"], ["c"], [[1.0]]))
    assert sorted(file.name for file in plots.iterdir()) == ["load.png", "load.svg"]
    assert list(tmp_path.iterdir()) == [plots]
