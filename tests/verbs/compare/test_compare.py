"""Checkpoints side by side: the numbers are those of `evaluate`, the marks those of a brute-force search."""

import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moetools
from moetools.errors import UserError
from moetools.verbs.compare.report import pareto_points


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory) -> dict[str, Path]:
    """An original, two of its outputs, and text."""
    folder = tmp_path_factory.mktemp("compare")
    made = {"original": folder / "original", "pruned": folder / "pruned", "packed": folder / "packed<b>"}
    shutil.copytree(tiny("mixtral"), made["original"])
    moetools.prune_experts(made["original"], made["pruned"], experts="0,1,2,3", device="cpu", verify=False)
    moetools.quantize(
        made["original"], made["packed"], method="rtn", scheme="w4a16", group_size=8, device="cpu", verify=False
    )
    ids = torch.randint(2, 128, (6, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, folder / "text.safetensors")
    return made | {"text": folder / "text.safetensors"}


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_losses_are_those_of_evaluate_and_pages_escape_names(models, tmp_path):
    outputs = [models["pruned"], models["packed"]]
    asked = {"reference": models["original"], "data": f"code={models['text']}", "seq_len": 16, "device": "cpu"}
    page = tmp_path / "page.html"
    found = moetools.compare(outputs, html=page, **asked).to_json()["models"]
    judged = moetools.evaluate(outputs, **asked).to_json()["models"]
    assert [model["name"] for model in found] == ["original", "pruned", "packed<b>"]
    assert [model["kl"] for model in found] == [model["agreement"]["kl"] for model in judged]
    assert [model["tasks"] for model in found] == [{"code": model["tasks"]["code"]["perplexity"]} for model in judged]
    assert [model["nbytes"] for model in found] == [weight_bytes(Path(model["path"])) for model in found]
    assert [model["experts"] for model in found] == [8, 4, 8]
    assert [model["format"] for model in found] == ["plain", "plain", "pack-quantized"]
    assert found[0]["pareto"]
    text = page.read_text()
    assert "packed&lt;b&gt;" in text
    assert "<b>" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_without_text_there_are_sizes_alone(models):
    result = moetools.compare([models["original"], models["packed"]])
    (table,) = result.tables()
    assert table.columns == ["Model", "MB", "Experts", "Bits", "Format"]
    assert "`data`" in table.note
    plain, packed = json.loads(json.dumps(result.to_json()))["models"]
    assert plain["kl"] is None
    assert not plain["pareto"]
    count = plain["parameters"]
    assert packed["bits_per_parameter"] == 8 * weight_bytes(models["packed"]) / count


def test_pareto_points_are_those_of_the_definition():
    draw = random.Random(0)
    for _ in range(50):
        points = [(draw.randint(0, 5), draw.choice([None, float("inf"), *range(6)])) for _ in range(8)]
        known = {one for one in points if one[1] not in (None, float("inf"))}
        beaten = {b for a, b in itertools.permutations(known, 2) if a[0] <= b[0] and a[1] <= b[1]}
        assert pareto_points(points) == [one in known - beaten for one in points]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("absent/page.html", "is missing or cannot be written to"),
        (".", "is a folder"),
        ("page.txt", "does not end in .html"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_first(models, tmp_path, page, message):
    with pytest.raises(UserError, match=message):
        moetools.compare([models["original"], tmp_path / "no such model"], html=tmp_path / page)
