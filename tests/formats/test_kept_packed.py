"""Pruning keeps the packed tensors of the experts that stay byte for byte: as published forms lie on disk, and as stock
transformers loads them where it does."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import published
import pytest
import torch
from packing import LINEARS, among, write_packed
from safetensors.torch import load_file, save_file

from moetools.formats.base import load_format
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.forward.options import ForwardOptions
from moetools.grids.base import make_grid
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate
from moetools.verbs.reduce.options import PruneOptions
from moetools.verbs.reduce.report import ReduceReport
from moetools.verbs.reduce.verb import prune_experts

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
    loaded_by_stock = name in ("mxfp4", "written mxfp4", "pack-quantized", "float-quantized", "fp8")
    assert (report.unchecked == "") == loaded_by_stock, report.unchecked


@pytest.mark.parametrize("name", ["gptq", "mxfp4", "fp8-deepseek"])
def test_the_output_computes_what_the_decoded_one_does(name: str, tiny, tmp_path: Path) -> None:
    model = make(name, tiny, tmp_path)
    kept = GROUPED if name == "fp8-deepseek" else KEPT
    for format_, out in (("same", "out"), ("bf16", "decoded")):
        prune(model, tmp_path / out, kept, Writing(verify=False), output_format=format_)
    ids = torch.randint(2, 128, (4, 24), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "text.safetensors")
    text = DataOptions(data=[f"text={tmp_path}/text.safetensors"], seq_len=24)
    found = evaluate([tmp_path / "out"], EvaluateOptions(reference=tmp_path / "decoded"), text, CPU).models[0].metrics
    assert found.agreement is not None
    assert found.agreement.kl == 0
