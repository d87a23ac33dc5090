"""place-experts and the plan of inspect-routing: the same model in another order, judged on other text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetools.errors import UserError
from moetools.forward.calibrate import load_statistics
from moetools.forward.options import ForwardOptions
from moetools.methods.placement import device_shares, imbalance
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.verbs.inspect.options import RoutingOptions
from moetools.verbs.inspect.routing import inspect_routing
from moetools.verbs.place.options import PlaceOptions
from moetools.verbs.place.plan import check_order
from moetools.verbs.place.report import PlaceReport
from moetools.verbs.place.verb import place_experts

CPU = ForwardOptions(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    file = tmp_path_factory.mktemp("ids") / "a.safetensors"
    save_file({"input_ids": torch.randint(2, 60, (200, 16), generator=torch.Generator().manual_seed(5))}, file)
    return DataOptions(data=[f"a={file}"], seq_len=16, batch_size=40)


def place(model: Path, out: Path, text: DataOptions, *, writing: Writing | None = None, **asked: Any) -> PlaceReport:
    return place_experts(model, out, PlaceOptions(**asked), text, CPU, writing or Writing(), command="moetools test")


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_the_output_computes_the_same(
    family: str, tiny: Callable[..., Path], stock: Callable[..., Any], text: DataOptions, tmp_path: Path
) -> None:
    model, out = tiny(family), tmp_path / "out"
    report = place(model, out, text, devices=4 if family != "deepseek_v3" else 2)
    ids = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = stock(model)(ids).logits, stock(out)(ids).logits
    assert torch.allclose(before, after, atol=2e-5)
    assert report.verified
    assert report.placement is not None
    assert any(layer.experts != sorted(layer.experts) for layer in report.placement.layers)
    old, new = (sorted(load_file(folder / "model.safetensors").items()) for folder in (model, out))
    assert [(name, tensor.shape, tensor.dtype) for name, tensor in old] == [(n, t.shape, t.dtype) for n, t in new]
    assert "It computes the same" in (out / "README.md").read_text()
    stored = json.loads((out / "moetools.json").read_text())["placement"]
    assert stored["layers"][0]["experts"] == report.placement.layers[0].experts


def test_the_plan_is_judged_on_sequences_it_was_not_made_from(
    tiny: Callable[..., Path], text: DataOptions, tmp_path: Path
) -> None:
    model, saved, file = tiny("mixtral"), tmp_path / "s.safetensors", tmp_path / "location.json"
    asked = RoutingOptions(save_stats=saved, devices=4, replicas=4, expert_location=file)
    plan = inspect_routing(model, asked, text, CPU).placement
    assert plan is not None
    assert (plan.held_out, plan.sequences) == (40, 200)
    slots_SE = load_statistics(saved).layers[1]["sequence_load"]["slots"]
    unseen = slots_SE[4::5].sum(0)
    _, load = device_shares(unseen, plan.layers[1].experts, 4)
    assert plan.layers[1].planned.imbalance == pytest.approx(imbalance(load))
    assert plan.layers[1].planned.imbalance < plan.layers[1].linear.imbalance
    rows = json.loads(file.read_text())["physical_to_logical_map"]
    assert rows == [layer.experts for layer in plan.layers]
    assert all(len(row) == 12 and set(row) == set(range(8)) for row in rows)
    # From the saved statistics the same, over the file that it wrote itself.
    again = inspect_routing(model, RoutingOptions(stats=saved, devices=4, replicas=4, expert_location=file),
                            DataOptions(), CPU)  # fmt: skip
    assert again.placement == plan
    assert place(model, tmp_path / "out", DataOptions(), stats=saved, devices=2).placement is not None


def test_dense_layers_have_a_row_in_the_location(tiny: Callable[..., Path], text: DataOptions, tmp_path: Path) -> None:
    file = tmp_path / "location.json"
    inspect_routing(tiny("qwen2_moe"), RoutingOptions(devices=2, expert_location=file), text, CPU)
    rows = json.loads(file.read_text())["physical_to_logical_map"]
    assert len(rows) == 3
    assert rows[1] == list(range(8))


@pytest.mark.parametrize(
    ("asked", "message", "routing"),
    [
        ({}, "how many devices", None),
        ({"devices": 3}, "8 experts cannot be dealt out evenly to 3 devices", "do not fill 3 devices"),
        ({"devices": 0}, "cannot be dealt out evenly to 0 devices", "do not form"),
    ],
)
def test_refused_before_anything_is_measured(
    asked: dict[str, Any],
    message: str,
    routing: str | None,
    tiny: Callable[..., Path],
    text: DataOptions,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=message):
        place(tiny("mixtral"), tmp_path / "out", text, **asked)
    if asked:
        with pytest.raises(UserError, match=routing):
            inspect_routing(tiny("mixtral"), RoutingOptions(**asked), text, CPU)


def test_router_groups_that_cannot_be_dealt_out() -> None:
    check_order(12, 2, 4)
    with pytest.raises(UserError, match="2 router groups cannot be dealt out evenly to 3 devices"):
        check_order(12, 2, 3)


def test_too_few_sequences_to_judge_it(
    tiny: Callable[..., Path], text: DataOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the pass that would measure them."""
    few = DataOptions(data=text.data, seq_len=16, samples=3)
    for module in ("place.work", "inspect.routing"):
        monkeypatch.setattr(f"moetools.verbs.{module}.collect_statistics", None)
    with pytest.raises(UserError, match="judged on sequences"):
        place(tiny("mixtral"), tmp_path / "out", few, devices=2)
    with pytest.raises(UserError, match="judged on sequences"):
        inspect_routing(tiny("mixtral"), RoutingOptions(devices=2), few, CPU)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_something_else_is_not_replaced(
    tiny: Callable[..., Path], text: DataOptions, tmp_path: Path
) -> None:
    file = tmp_path / "mine.json"
    file.write_text("{}")
    with pytest.raises(UserError, match="is something else"):
        inspect_routing(tiny("mixtral"), RoutingOptions(devices=2, expert_location=file), text, CPU)
    with pytest.raises(UserError, match="how many devices"):
        inspect_routing(tiny("mixtral"), RoutingOptions(replicas=2), text, CPU)


def test_a_dry_run_writes_nothing(tiny: Callable[..., Path], text: DataOptions, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = place(tiny("mixtral"), out, text, writing=Writing(dry_run=True), devices=2)
    assert report.dry_run
    assert report.tables()[0].rows
    assert not out.exists()
