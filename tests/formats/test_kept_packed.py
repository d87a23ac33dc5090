"""Pruning keeps the packed tensors of the experts that stay byte for byte: as published forms lie on disk, and as stock
transformers loads them where it does."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import published
import pytest
import torch
from mtp_models import LAYERS, make_mtp
from packing import LINEARS, among, write_packed
from safetensors.torch import load_file, save_file

from moetools.checkpoint.writer import CheckpointWriter
from moetools.errors import UserError
from moetools.formats.base import load_format
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.forward.options import ForwardOptions
from moetools.grids.base import make_grid
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate
from moetools.verbs.place.options import PlaceOptions
from moetools.verbs.place.verb import place_experts
from moetools.verbs.reduce.options import MergeOptions, PruneOptions
from moetools.verbs.reduce.report import ReduceReport
from moetools.verbs.reduce.verb import merge_experts, prune_experts
from moetools.verbs.route.options import RouteOptions
from moetools.verbs.route.verb import route_tasks

CPU = ForwardOptions(device="cpu")
KEPT = [0, 2, 3, 5, 6, 7]
GROUPED = [0, 2, 3, 4, 5, 7]
"""As many of the first four as of the last four."""
EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
BLOCKS = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 4}
WIDE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
WRITTEN = {
    "pack-quantized": (WIDE, {"kind": "integer", "bits": 4, "group_size": 8}),
    "float-quantized": (WIDE, {"kind": "float8"}),
    "fp8": (BLOCKS, {"kind": "float8_block"}),
    "written nvfp4": (WIDE, {"kind": "nvfp4"}),
    "written mxfp4": (WIDE, {"kind": "mxfp4"}),
}
"""Forms that moetools writes as well, on Mixtral."""


def make(name: str, tiny: Callable[..., Path], folder: Path) -> Path:
    if name in published.CASES:
        return published.case(name, tiny, folder)[0]
    options, grid = WRITTEN[name]
    layout, chosen = load_format(name.removeprefix("written ")), among(LINEARS, make_grid(grid))
    return write_packed(tiny("mixtral", **options), folder / "packed", layout, chosen)[0]


def prune(model: Path, out: Path, kept: list[int], writing: Writing, **options: str) -> ReduceReport:
    return prune_experts(
        model, out, PruneOptions(experts=",".join(map(str, kept)), **options), DataOptions(), CPU, writing
    )


def expected(source: dict[str, torch.Tensor], kept: list[int]) -> dict[str, torch.Tensor]:
    """The tensors of the input that the output has, by their names there."""
    found = {}
    for name, tensor in source.items():
        numbered = EXPERT.fullmatch(name)
        if numbered is None:
            router = re.search(r"mlp\.(gate|router)\.|block_sparse_moe\.gate\.", name)
            found[name] = tensor[kept] if router or ".experts." in name else tensor
        elif int(numbered[2]) in kept:
            found[f"{numbered[1]}{kept.index(int(numbered[2]))}{numbered[3]}"] = tensor
    return found


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    pair = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*pair)


def write_text(folder: Path, *tasks: str) -> DataOptions:
    for seed, task in enumerate(tasks):
        ids = torch.randint(2, 128, (24, 24), generator=torch.Generator().manual_seed(seed))
        save_file({"input_ids": ids}, folder / f"{task}.safetensors")
    return DataOptions(data=[f"{task}={folder / task}.safetensors" for task in tasks], seq_len=24, batch_size=8)


@pytest.mark.parametrize("name", [*published.CASES, *WRITTEN])
def test_kept_experts_keep_their_bytes(name: str, tiny, tmp_path: Path) -> None:
    model = make(name, tiny, tmp_path)
    kept = GROUPED if name == "fp8-deepseek" else KEPT
    report = prune(model, tmp_path / "out", kept, Writing())
    prune(model, tmp_path / "decoded", kept, Writing(verify=False), output_format="bf16")

    wanted, found = (
        expected(load_file(model / "model.safetensors"), kept),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert found.keys() == wanted.keys()
    assert all(same_bytes(found[tensor], wanted[tensor]) for tensor in wanted)
    stated = (json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "out"))
    assert len({json.dumps(config["quantization_config"]) for config in stated}) == 1

    view, plain = open_model(tmp_path / "out"), load_file(tmp_path / "decoded/model.safetensors")
    assert isinstance(view, PackedCheckpoint)
    read = view.read(view.tensors)
    assert read.keys() == plain.keys()
    assert all(same_bytes(read[tensor], plain[tensor]) for tensor in plain)

    assert report.verified
    assert report.after["bytes"] == sum(tensor.nbytes for tensor in found.values())
    assert not any(part.changed for part in report.parts.values())
    loaded_by_stock = name in ("deepseek-v4", "mxfp4", "written mxfp4", "pack-quantized", "float-quantized", "fp8")
    assert (report.unchecked == "") == loaded_by_stock, report.unchecked


@pytest.mark.parametrize("name", ["gptq", "mxfp4", "fp8-deepseek"])
def test_the_output_computes_what_the_decoded_one_does(name: str, tiny, tmp_path: Path) -> None:
    model = make(name, tiny, tmp_path)
    kept = GROUPED if name == "fp8-deepseek" else KEPT
    for format_, out in (("same", "out"), ("bf16", "decoded")):
        prune(model, tmp_path / out, kept, Writing(verify=False), output_format=format_)
    text = write_text(tmp_path, "text")
    found = evaluate([tmp_path / "out"], EvaluateOptions(reference=tmp_path / "decoded"), text, CPU).models[0].metrics
    assert found.agreement is not None
    assert found.agreement.kl == 0


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_experts_that_stay_plain_keep_their_names_in_the_config(tiny, tmp_path: Path) -> None:
    """They lie plain among packed ones, and the lists of config.json and of the file beside it name them."""
    plain = ["model.layers.0.mlp.experts.2", "model.layers.0.mlp.experts.4", "model.layers.1.mlp.experts.7.down_proj"]
    config = published.BLOCKS | {"modules_to_not_convert": ["lm_head", *plain]}
    family, sizes, packer, _ = published.CASES["fp8-qwen"]

    def chosen(name: str) -> bool:
        return published.linear(name) and not any(name.startswith(f"{module}.") for module in plain)

    model, _ = published.publish(tiny(family, **sizes), tmp_path, packer, chosen, config)
    (model / "quant_config.json").write_text(json.dumps({"exclude": {plain[2]: 1, plain[1]: 2}}))
    listed = {"0": KEPT, "1": [1, 2, 3, 5, 6, 7]}
    (tmp_path / "experts.json").write_text(json.dumps(listed))
    options = PruneOptions(experts=str(tmp_path / "experts.json"))
    prune_experts(model, tmp_path / "out", options, DataOptions(), CPU, Writing())

    wanted = ["lm_head", "model.layers.0.mlp.experts.1", "model.layers.1.mlp.experts.5.down_proj"]
    assert config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"] == wanted
    assert json.loads((tmp_path / "out/quant_config.json").read_text()) == {"exclude": {wanted[2]: 1}}
    stored = open_model(tmp_path / "out")
    assert isinstance(stored, PackedCheckpoint)
    experts = {name for name in stored.tensors if ".experts." in name}
    assert {name.rpartition(".")[0] for name in experts - stored.packed.keys()} == {
        *(f"{wanted[1]}.{part}_proj" for part in ("gate", "up", "down")),
        wanted[2],
    }
    prune(model, tmp_path / "decoded", KEPT, Writing(verify=False), output_format="bf16")
    assert not (tmp_path / "decoded/quant_config.json").exists()


def test_prediction_layers_keep_their_bytes(tmp_path: Path) -> None:
    dense = make_mtp("deepseek_v3", tmp_path / "dense", dtype=torch.bfloat16)
    left = f"model.layers.{LAYERS}.mlp.experts.5.up_proj"
    config = published.BLOCKS | {"modules_to_not_convert": [left]}

    def chosen(name: str) -> bool:
        return published.linear(name) and name != f"{left}.weight"

    model, _ = published.publish(dense, tmp_path, published.fp8, chosen, config)
    report = prune(model, tmp_path / "out", GROUPED, Writing())
    assert report.mtp is not None
    assert report.mtp["mode"] == "follow"
    wanted = expected(load_file(model / "model.safetensors"), GROUPED)
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(same_bytes(found[name], wanted[name]) for name in wanted)
    kept = config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    assert kept == [left.replace("experts.5", "experts.4")]


def test_an_interrupted_run_resumes_to_the_same_bytes(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gptq", tiny, tmp_path)
    stated = config_of(model)
    stated["quantization_config"]["ignore"] = ["model.layers.0.mlp.experts.3"]
    (model / "config.json").write_text(json.dumps(stated))
    prune(model, tmp_path / "whole", KEPT, Writing(verify=False))
    write = CheckpointWriter.write_unit

    def stopping(self: CheckpointWriter, name: str, *args: object) -> None:
        write(self, name, *args)
        if name == "layer-00000":
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "write_unit", stopping)
    with pytest.raises(KeyboardInterrupt):
        prune(model, tmp_path / "out", KEPT, Writing(verify=False))
    monkeypatch.setattr(CheckpointWriter, "write_unit", write)
    prune(model, tmp_path / "out", KEPT, Writing(verify=False, resume=True))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert config_of(tmp_path / "out")["quantization_config"]["ignore"] == ["model.layers.0.mlp.experts.2"]


@pytest.mark.parametrize("name", ["mxfp4", "pack-quantized", "fp8-deepseek"])
def test_the_outline_is_what_is_written(name: str, tiny, tmp_path: Path) -> None:
    model, kept = make(name, tiny, tmp_path), GROUPED
    report = prune(model, tmp_path / "none", kept, Writing(dry_run=True, outline=tmp_path / "outline"))
    prune(model, tmp_path / "out", kept, Writing(verify=False))
    outline, made = open_model(tmp_path / "outline"), open_model(tmp_path / "out")
    assert outline.config == made.config
    assert {name: info.shape for name, info in outline.tensors.items()} == {
        name: info.shape for name, info in made.tensors.items()
    }
    assert outline.total_bytes == made.total_bytes
    assert abs(report.after["bytes"] - made.total_bytes) < 0.01 * made.total_bytes
    assert not any(part.changed for part in report.parts.values())


def test_what_makes_new_weights_cannot_stay_packed(tiny, tmp_path: Path) -> None:
    model, out, text = make("awq", tiny, tmp_path), tmp_path / "out", DataOptions(data=[str(tmp_path)])
    asked = PruneOptions(keep=6, refit="joint", output_format="same")
    with pytest.raises(UserError, match="`refit=joint` solves for new weights") as caught:
        prune_experts(model, out, asked, text, CPU, Writing())
    assert "moetools quantize" in str(caught.value.hint)
    with pytest.raises(UserError, match="merging makes new weights"):
        merge_experts(model, out, MergeOptions(to=6, output_format="same"), text, CPU, Writing())
    with pytest.raises(UserError, match="unknown output format 'fp16'"):
        prune(model, out, KEPT, Writing(), output_format="fp16")


def test_patterns_of_single_experts_are_decoded_and_say_so(
    tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("awq", tiny, tmp_path)
    stated = config_of(model)
    stated["quantization_config"]["modules_to_not_convert"] = [r"re:.*experts\.3\..*"]
    (model / "config.json").write_text(json.dumps(stated))
    with pytest.raises(UserError, match=r"single experts \('re:"):
        prune(model, tmp_path / "out", KEPT, Writing(), output_format="same")
    report = prune(model, tmp_path / "out", KEPT, Writing(verify=False))
    assert "packed weights are decoded" in caplog.text
    assert report.precision.startswith("written as bfloat16")
    assert report.parts["experts"].to_json() == {
        "before": "integer4 per 16 columns",
        "after": "bfloat16",
        "changed": True,
    }


def packed_bytes(folder: Path) -> list[bytes]:
    """The contents of all packed parts, sorted: experts may be in any order."""
    view, tensors = open_model(folder), load_file(folder / "model.safetensors")
    assert isinstance(view, PackedCheckpoint)
    names = [disk for one in view.packed.values() for disk in one.parts.values()]
    return sorted(tensors[name].numpy().tobytes() for name in names)


def test_another_order_keeps_the_bytes(tiny, tmp_path: Path) -> None:
    model = make("gptq", tiny, tmp_path)
    report = place_experts(
        model, tmp_path / "out", PlaceOptions(devices=2), write_text(tmp_path, "text"), CPU, Writing()
    )
    assert report.verified
    assert report.placement is not None
    assert any(layer.experts != sorted(layer.experts) for layer in report.placement.layers)
    assert packed_bytes(tmp_path / "out") == packed_bytes(model)


def test_experts_of_a_task_and_healed_routers_keep_the_bytes(tiny, tmp_path: Path) -> None:
    """Only routers are trained; a refit that is asked for is refused before any text is read."""
    model, text = make("gptq", tiny, tmp_path), write_text(tmp_path, "one", "two")
    options = RouteOptions(keep=6, refit="none", tune_router=1, classifier="none", report=False)
    route_tasks(model, tmp_path / "tasks", options, text, CPU, Writing(verify=False))
    healed = PruneOptions(keep=6, heal=1, heal_train="router")
    prune_experts(model, tmp_path / "healed", healed, text, CPU, Writing(verify=False))
    whole = packed_bytes(model)
    for folder in ("tasks/one", "healed"):
        kept = packed_bytes(tmp_path / folder)
        assert len(kept) < len(whole)
        assert set(kept) <= set(whole)
    refused = RouteOptions(keep=6, refit="joint", output_format="same")
    with pytest.raises(UserError, match="`refit=joint` solves for new weights"):
        route_tasks(model, tmp_path / "out", refused, DataOptions(data=["one=nowhere", "two=nowhere"]), CPU, Writing())
