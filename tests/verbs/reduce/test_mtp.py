"""What becomes of multi-token-prediction layers when the number of experts changes."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mtp_models import LAYERS, MTP_FAMILIES, make_mtp, mtp_tensors, stock_drafts
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from moetools.architectures.base import find_architecture
from moetools.architectures.config_check import counted_experts
from moetools.checkpoint.reader import open_checkpoint
from moetools.checkpoint.writer import CheckpointWriter
from moetools.errors import UserError
from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.verbs.reduce.options import MergeOptions, PruneOptions
from moetools.verbs.reduce.report import ReduceReport
from moetools.verbs.reduce.verb import merge_experts, prune_experts
from moetools.verbs.route.options import RouteOptions
from moetools.verbs.route.verb import route_tasks

CPU = ForwardOptions(device="cpu", dtype="float32")
KEPT = [0, 2, 3, 4, 6, 7]


@pytest.fixture(scope="module", params=MTP_FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp(request.param, tmp_path_factory.mktemp("mtp") / request.param)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp("deepseek_v3", tmp_path_factory.mktemp("mtp") / "deepseek_v3")


def prune(model: Path, out: Path, **options: object) -> ReduceReport:
    listed = ",".join(map(str, KEPT))
    asked = PruneOptions(**{"experts": listed, **options})
    return prune_experts(model, out, asked, DataOptions(), CPU, Writing(), command="moetools test")


@contextmanager
def watching_router(chosen: list[torch.Tensor]) -> Iterator[None]:
    """Notes the experts that every router of transformers' own GLM-4.5 chooses, call after call."""
    route = Glm4MoeTopkRouter.forward

    def noting(self: Any, hidden: torch.Tensor) -> Any:
        found = route(self, hidden)
        chosen.append(found[2])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Glm4MoeTopkRouter, "forward", noting)
        yield


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def test_dropped_layers_leave_no_tensor_and_no_count(deepseek: Path, tmp_path: Path) -> None:
    report = prune(deepseek, tmp_path / "out", mtp="drop")
    assert not mtp_tensors(tmp_path / "out")
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    assert report.mtp == {"mode": "drop", "tensors": len(mtp_tensors(deepseek)), "experts": 8}
    assert "left out" in (tmp_path / "out" / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_layers_that_could_not_load_are_not_kept(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"have 8 experts and config\.json will count fewer") as refused:
        prune(model, tmp_path / "out", mtp="keep")
    assert "`mtp=follow`" in str(refused.value.hint)
    assert not (tmp_path / "out").exists()


def test_layers_are_kept_where_no_expert_goes(deepseek: Path, tmp_path: Path) -> None:
    report = prune(deepseek, tmp_path / "out", experts="0,1,2,3,4,5,6,7", mtp="keep")
    before, after = load_file(deepseek / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report.mtp is not None
    assert report.mtp["mode"] == "keep"


def test_an_unknown_mode_is_refused(deepseek: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mtp"):
        prune(deepseek, tmp_path / "out", mtp="flollow")


def test_layers_follow_an_explicit_list(model: Path, tmp_path: Path) -> None:
    """Slicing by hand: the listed experts under new numbers, the router's rows, everything else byte for byte."""
    report = prune(model, tmp_path / "out")
    before, after = mtp_tensors(model), mtp_tensors(tmp_path / "out")
    expected = {}
    for name, tensor in before.items():
        numbered = re.search(r"\.experts\.(\d+)\.", name)
        if numbered:
            if int(numbered[1]) in KEPT:
                new = KEPT.index(int(numbered[1]))
                expected[name.replace(numbered[0], f".experts.{new}.")] = tensor
        else:
            expected[name] = tensor[KEPT] if re.search(r"mlp\.gate\.", name) else tensor
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    config = config_of(tmp_path / "out")
    assert config.get("n_routed_experts", config.get("num_experts")) == len(KEPT)
    assert config.get("num_nextn_predict_layers") == config_of(model).get("num_nextn_predict_layers")
    assert report.mtp is not None
    assert report.mtp["mode"] == "follow"
    assert [tuple(cluster) for cluster in report.mtp["layers"][0]["decision"]["clusters"]] == [(e,) for e in KEPT]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (28, 16), generator=torch.Generator().manual_seed(3))}, file)
    return file


def test_layers_are_measured_and_reduced_like_any_other(tmp_path: Path, tokens: Path) -> None:
    """REAP behind the original's trunk, with and without a refit; drafts are accepted as often as in transformers."""
    model, text = make_mtp("glm4_moe", tmp_path / "model"), DataOptions(data=[str(tokens)])
    held_out = load_file(tokens)["input_ids"][6::7]
    for refit in ("none", "joint"):
        out = tmp_path / refit
        asked = PruneOptions(keep=6, refit=refit, sequential=refit == "joint")
        report = prune_experts(model, out, asked, text, CPU, Writing(), command="moetools test")
        assert report.mtp is not None
        (layer,) = report.mtp["layers"]
        assert layer["layer"] == LAYERS
        assert len(layer["decision"]["clusters"]) == 6
        for when, path in (("before", model), ("after", out)):
            drafts, trunk = stock_drafts(path, held_out)
            wanted = (drafts.argmax(-1) == trunk[:, 1:].argmax(-1)).double().mean().item()
            assert layer["acceptance"][when] == pytest.approx(wanted)
        assert layer["acceptance"]["positions"] == 4 * 15
        assert "greedy drafts accepted" in (out / "README.md").read_text()


def test_what_is_measured_is_what_the_layer_does_in_transformers(tmp_path: Path, tokens: Path) -> None:
    model = make_mtp("glm4_moe", tmp_path / "model")
    asked = PruneOptions(keep=6, method="frequency")
    report = prune_experts(model, tmp_path / "out", asked, DataOptions(data=[str(tokens)]), CPU, Writing())
    assert report.mtp is not None
    shares = torch.tensor(report.mtp["layers"][0]["decision"]["details"]["scores"])
    chosen: list[torch.Tensor] = []
    with watching_router(chosen):
        stock_drafts(model, load_file(tokens)["input_ids"])
    slots = torch.bincount(chosen[-1].flatten(), minlength=8)
    assert torch.allclose(shares, slots / slots.sum())


def test_merged_layers_follow(tmp_path: Path, tokens: Path) -> None:
    model = make_mtp("qwen3_next", tmp_path / "model")
    asked = MergeOptions(to=4, method="m-smoe", refit="none")
    report = merge_experts(model, tmp_path / "out", asked, DataOptions(data=[str(tokens)]), CPU, Writing())
    assert report.verified
    assert report.mtp is not None
    assert report.mtp["mode"] == "follow"
    tensors = open_checkpoint(tmp_path / "out").tensors
    inside = {name: tensors[name] for name in mtp_tensors(tmp_path / "out")}
    assert counted_experts(inside, find_architecture(config_of(tmp_path / "out"))) == 4


def test_an_interrupted_run_resumes_to_the_same_bytes(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = make_mtp("glm4_moe", tmp_path / "model"), DataOptions(data=[str(tokens)])
    asked = PruneOptions(keep=6)
    prune_experts(model, tmp_path / "whole", asked, text, CPU, Writing())
    write = CheckpointWriter.write_unit

    def stopping(self: CheckpointWriter, name: str, *args: Any) -> None:
        write(self, name, *args)
        if name == "layer-00001":
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "write_unit", stopping)
    with pytest.raises(KeyboardInterrupt):
        prune_experts(model, tmp_path / "out", asked, text, CPU, Writing())
    monkeypatch.setattr(CheckpointWriter, "write_unit", write)
    prune_experts(model, tmp_path / "out", asked, text, CPU, Writing(resume=True))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_unknown_tensors_are_dropped_by_default_and_refused_if_asked_to_follow(tmp_path: Path) -> None:
    model = make_mtp("glm4_moe", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights[f"model.layers.{LAYERS}.novel.weight"] = torch.ones(3)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="unknown tensors") as refused:
        prune(model, tmp_path / "out", mtp="follow")
    assert "`mtp=drop`" in str(refused.value.hint)
    report = prune(model, tmp_path / "out")
    assert not mtp_tensors(tmp_path / "out")
    assert "left out" in report.warnings[0]
    assert "left out" in (tmp_path / "out" / "README.md").read_text()


def test_task_checkpoints_follow(tmp_path: Path, tokens: Path) -> None:
    model = make_mtp("glm4_moe", tmp_path / "model")
    options = RouteOptions(keep=6, classifier="none", report=False, refit="none")
    other = tmp_path / "other.safetensors"
    save_file({"input_ids": load_file(tokens)["input_ids"].flip(1)}, other)
    text = DataOptions(data=[f"one={tokens}", f"two={other}"], seq_len=16)
    route_tasks(model, tmp_path / "out", options, text, CPU, Writing())
    written = mtp_tensors(tmp_path / "out" / "one")
    assert written[f"model.layers.{LAYERS}.mlp.gate.weight"].shape[0] == 6
    assert config_of(tmp_path / "out" / "one")["n_routed_experts"] == 6
    with pytest.raises(UserError, match="`mtp=keep`"):
        route_tasks(model, tmp_path / "kept", replace(options, mtp="keep"), text, CPU, Writing())


def test_a_list_by_layer_names_the_layers_behind_the_last(tmp_path: Path) -> None:
    model, file = make_mtp("glm4_moe", tmp_path / "model"), tmp_path / "list.json"
    lists = {"1": [0, 1, 2, 4, 5, 6], "2": [1, 2, 3, 4, 5, 6], str(LAYERS): [0, 2, 3, 5, 6, 7]}
    file.write_text(json.dumps(lists))
    report = prune(model, tmp_path / "out", experts=str(file))
    assert report.mtp is not None
    assert report.mtp["layers"][0]["decision"]["clusters"] == [[expert] for expert in lists[str(LAYERS)]]
    file.write_text(json.dumps({layer: lists[layer] for layer in ("1", "2")}))
    with pytest.raises(UserError, match=rf"`experts` lists nothing for layer {LAYERS}"):
        prune(model, tmp_path / "other", experts=str(file), mtp="follow")
    assert "left out" in prune(model, tmp_path / "other", experts=str(file)).warnings[0]
