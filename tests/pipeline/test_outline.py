"""An outline says of a checkpoint what is then written: names, dtypes, shapes, config."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moetools.formats.reader import open_model
from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.training.options import TrainOptions
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.distill.verb import distill
from moetools.verbs.reduce.options import MergeOptions, PruneOptions
from moetools.verbs.reduce.verb import merge_experts, prune_experts
from tests.verbs.reduce.test_prediction_layers import with_prediction_layer

CPU = ForwardOptions(device="cpu")


def contents(folder: Path):
    checkpoint = open_model(folder)
    return checkpoint.config, {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}


@pytest.fixture
def text(tmp_path):
    ids = torch.randint(2, 128, (12, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "text.safetensors")
    return DataOptions(data=[str(tmp_path / "text.safetensors")], seq_len=16)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_a_reduced_checkpoint(family, tiny, tmp_path):
    options = PruneOptions(experts="0,1,2,4,5,6")
    for how, out in ((Writing(dry_run=True, outline=tmp_path / "outline"), "none"), (Writing(verify=False), "made")):
        report = prune_experts(tiny(family), tmp_path / out, options, DataOptions(), CPU, how)
    assert contents(tmp_path / "outline") == contents(tmp_path / "made")
    assert not (tmp_path / "none").exists()
    assert open_model(tmp_path / "outline").total_bytes == report.after["bytes"]


def test_a_merged_one_has_no_weights_yet(tiny, text, tmp_path):
    how = Writing(dry_run=True, outline=tmp_path / "outline")
    merge_experts(tiny("mixtral"), tmp_path / "none", MergeOptions(to=2), text, CPU, how)
    outline = open_model(tmp_path / "outline")
    assert outline.config["num_local_experts"] == 2
    assert not any(tensor.any() for tensor in outline.read(outline.tensors).values())


def test_a_dense_student(tiny, text, tmp_path):
    options = StudentOptions(local_steps=0, warm_start=False, init="mean")
    for how, out in ((Writing(dry_run=True, outline=tmp_path / "outline"), "none"), (Writing(verify=False), "made")):
        distill(tiny("mixtral"), tmp_path / out, options, TrainOptions(), text, CPU, how)
    assert contents(tmp_path / "outline") == contents(tmp_path / "made")


def test_layers_for_multi_token_prediction_are_left_out_as_in_the_output(tmp_path):
    model = with_prediction_layer("glm4_moe", tmp_path / "model")
    options = PruneOptions(experts="0,1,2,4,5,6")
    for how, out in ((Writing(dry_run=True, outline=tmp_path / "outline"), "none"), (Writing(verify=False), "made")):
        prune_experts(model, tmp_path / out, options, DataOptions(), CPU, how)
    assert contents(tmp_path / "outline") == contents(tmp_path / "made")
