"""A packed checkpoint runs through the core as the plain one it stands for, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from packing import EXPERTS, LINEARS, among, write_packed
from safetensors.torch import load_file, save_file

from moetools.checkpoint.reader import Checkpoint, open_checkpoint
from moetools.errors import CheckpointError
from moetools.formats.base import Format, UnknownPackingError, load_format
from moetools.formats.reader import PackedCheckpoint, describe_quantization, expand, open_model, precision_note
from moetools.forward.evaluate import measure_size
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.grids.base import Grid, make_grid
from moetools.text.tokens import TokenBatch

IDS = torch.arange(32).reshape(2, 16)


def integer(bits: int, group: int | None = 8, **options: object) -> Grid:
    return make_grid({"kind": "integer", "bits": bits, "group_size": group, **options})


def by_expert(name: str) -> Grid | None:
    if ".experts." not in name:
        return among(LINEARS, integer(4))(name)
    return integer(2 + int(name.split(".experts.")[1].split(".")[0]) % 4)


def pair(source: Path, folder: Path, layout: Format, choose) -> tuple[PackedCheckpoint, Checkpoint]:
    packed, intended = write_packed(source, folder / "packed", layout, choose)
    plain = shutil.copytree(source, folder / "plain")
    save_file(intended, plain / "model.safetensors", metadata={"format": "pt"})
    view = open_model(packed)
    assert isinstance(view, PackedCheckpoint)
    return view, open_checkpoint(plain)


def streamed_logits(checkpoint: Checkpoint) -> torch.Tensor:
    model = StreamedModel(checkpoint, ForwardOptions(device="cpu"))
    model.stock.check_names()
    batch = TokenBatch(input_ids=IDS, attention_mask=None, task=torch.zeros(2, dtype=torch.long))
    with torch.inference_mode():
        hidden = model.skeleton.enter(batch)[0]
        for layer in model.layers():
            hidden = model.run_layer(layer, batch, hidden)
        return model.skeleton.logits(batch, hidden)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("layout", ["pack-quantized", "moetools"])
def test_the_core_runs_it_like_the_plain_checkpoint(family: str, layout: str, tiny, tmp_path: Path) -> None:
    choose = by_expert if layout == "moetools" else among(LINEARS, integer(3))
    if family == "gpt_oss":
        choose = among(("self_attn",), integer(3))
    view, plain = pair(tiny(family), tmp_path, load_format(layout), choose)
    assert list(view.tensors) == list(plain.tensors)
    assert view.config == plain.config
    assert torch.equal(streamed_logits(view), streamed_logits(plain))


@pytest.fixture
def packed(tiny, tmp_path: Path) -> tuple[PackedCheckpoint, Checkpoint]:
    return pair(tiny("mixtral"), tmp_path, load_format("moetools"), by_expert)


def test_sizes_are_those_on_disk(packed: tuple[PackedCheckpoint, Checkpoint]) -> None:
    view, plain = packed
    model = StreamedModel(view, ForwardOptions(device="cpu"))
    size = measure_size(view, model.arch)
    file = view.path / "model.safetensors"
    assert size.nbytes == file.stat().st_size < plain.total_bytes
    assert size.parameters == sum(info.nbytes // 2 for info in plain.tensors.values())
    assert size.bits_per_parameter == 8 * file.stat().st_size / size.parameters
    assert sum(view.stored_bytes(name) for name in view.tensors) == view.total_bytes == view.disk.total_bytes
    assert view.fingerprint() == open_checkpoint(view.path).fingerprint() != plain.fingerprint()
    # The memory plan needs what a tensor takes once decoded.
    assert {name: info.nbytes for name, info in view.tensors.items()} == {n: i.nbytes for n, i in plain.tensors.items()}


def test_expanding_gives_the_plain_checkpoint(packed: tuple[PackedCheckpoint, Checkpoint]) -> None:
    view, plain = packed
    units = dict(expand(view))
    assert list(units) == ["layer-00000", "layer-00001", "layer-00002", "rest"]
    tensors = {name: tensor for unit in units.values() for name, tensor in unit.items()}
    expected = plain.read(plain.tensors)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert all(tensors[name].dtype == expected[name].dtype for name in expected)


def test_reports_say_what_it_is(packed: tuple[PackedCheckpoint, Checkpoint]) -> None:
    view, plain = packed
    assert precision_note(plain) == ""
    said = precision_note(view)
    assert said.startswith("written as bfloat16; the input was moetools (")
    assert "tensors integer3 per 8 columns" in said
    assert describe_quantization(view).count("tensors integer") == 4


def test_entropy_coded_experts_are_decoded_together(tiny, tmp_path: Path) -> None:
    grid = make_grid({"kind": "entropy", "rate": 2.0})
    view, plain = pair(tiny("mixtral", hidden_size=64), tmp_path, load_format("moetools"), among(EXPERTS, grid))
    assert torch.equal(streamed_logits(view), streamed_logits(plain))
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert torch.equal(view.read([name])[name], plain.read([name])[name])


def test_what_is_not_read_here_is_named(tiny, rewrite) -> None:
    strange = rewrite(tiny("mixtral"), config={"quantization_config": {"quant_method": "quip", "bits": 4}})
    with pytest.raises(UnknownPackingError, match="quant_method 'quip'"):
        open_model(strange)
    newer = rewrite(tiny("mixtral"), config={"quantization_config": {"quant_method": "moetools", "version": 2}})
    with pytest.raises(CheckpointError, match="version 2, known is 1"):
        open_model(newer)


def broken(view: PackedCheckpoint, change) -> Path:
    tensors = load_file(view.path / "model.safetensors")
    change(tensors)
    save_file(tensors, view.path / "model.safetensors", metadata={"format": "pt"})
    return view.path


def test_missing_and_corrupt_parts_are_named(packed: tuple[PackedCheckpoint, Checkpoint]) -> None:
    view, _ = packed
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    path = broken(view, lambda tensors: tensors[f"{name}_integer"].__setitem__(40, 99))
    with pytest.raises(CheckpointError, match=r"experts.3.w2.weight' is corrupt: the checksum"):
        open_model(path).read([name])
    with pytest.raises(CheckpointError, match=r"experts.3.w2.weight' is corrupt: the checksum"):
        streamed_logits(open_model(path))
    path = broken(view, lambda tensors: tensors.pop(f"{name}_integer"))
    with pytest.raises(CheckpointError, match=rf"'{name}_integer' is missing"):
        open_model(path)


def test_stock_parts_that_do_not_fit_are_named(tiny, tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    view, _ = pair(tiny("mixtral"), tmp_path, load_format("pack-quantized"), among(EXPERTS, integer(4)))
    wide = torch.zeros(32, 4, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"experts.3.w2.weight': packed \[32, 4\]"):
        open_model(broken(view, lambda tensors: tensors.__setitem__(f"{name}_packed", wide))).read([name])
    with pytest.raises(CheckpointError, match=rf"has no '{name}_scale'"):
        open_model(broken(view, lambda tensors: tensors.pop(f"{name}_scale")))


def test_a_shape_in_config_json_that_is_not_on_disk_is_noticed(packed: tuple[PackedCheckpoint, Checkpoint]) -> None:
    view, _ = packed
    config = json.loads((view.path / "config.json").read_text())
    group = config["quantization_config"]["groups"][0]
    group["shape"] = group["shape"][::-1]
    (view.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"in config\.json and"):
        open_model(view.path).read(group["tensors"][:1])


def test_eight_bit_codes_without_their_scales_are_refused(tiny, tmp_path: Path) -> None:
    """Found by fuzzing: they were taken for the numbers themselves."""
    layout = load_format("float-quantized")
    packed, _ = write_packed(
        tiny("mixtral"), tmp_path / "packed", layout, among(EXPERTS, make_grid({"kind": "float8"}))
    )
    tensors = load_file(packed / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("weight_scale"))
    del tensors[lost]
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is stored as F8_E4M3 and its scales are missing"):
        open_model(packed)
