"""Layers for multi-token prediction that cannot follow are left out where engines could not load them any more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.quantize.verb import quantize
from moetools.verbs.route.options import RouteOptions
from moetools.verbs.route.verb import route_tasks
from tests.families import make_tiny
from tests.verbs.reduce.reducing import CPU, reduce

LAYERS = 3
KEYS = {"deepseek_v3": "num_nextn_predict_layers", "glm4_moe": "num_nextn_predict_layers", "qwen3_moe": None}
IN_STOCK = """
import sys, transformers
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
for path in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"], info
    assert not getattr(model.config, "num_nextn_predict_layers", 0)
assert "moetools" not in sys.modules
"""


def with_prediction_layer(family: str, folder: Path) -> Path:
    """A tiny model and a copy of its last layer behind it, named as DeepSeek or Qwen3-Next name theirs."""
    model = make_tiny(family, folder)
    weights = load_file(model / "model.safetensors")
    prefix = "mtp." if KEYS[family] is None else f"model.layers.{LAYERS}."
    inner = f"{prefix}layers.0." if KEYS[family] is None else prefix
    own = f"model.layers.{LAYERS - 1}."
    weights |= {inner + name.removeprefix(own): weights[name].clone() for name in weights if name.startswith(own)}
    width = len(weights["model.norm.weight"])
    weights[f"{prefix}eh_proj.weight"] = torch.zeros(width, 2 * width, dtype=torch.bfloat16)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    if KEYS[family] is not None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, KEYS[family]: 1}))
    return model


def prediction(folder: Path, family: str) -> set[str]:
    """Names of the layer's tensors."""
    prefix = "mtp." if KEYS[family] is None else f"model.layers.{LAYERS}."
    return {name for name in load_file(folder / "model.safetensors") if name.startswith(prefix)}


@pytest.fixture
def text(tmp_path: Path) -> DataOptions:
    ids = torch.randint(2, 128, (16, 16), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": ids}, tmp_path / "tokens.safetensors")
    return DataOptions(data=[f"a={tmp_path / 'tokens.safetensors'}"], seq_len=16, batch_size=8)


@pytest.mark.parametrize("family", KEYS)
def test_fewer_experts_leave_them_out_and_stock_loads_the_rest(
    family: str, text: DataOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, out = with_prediction_layer(family, tmp_path / "model"), tmp_path / "out"
    planned = reduce("prune", model, tmp_path / "dry", text, method="reap", target=6, dry_run=True)
    report = reduce("prune", model, out, text, method="reap", target=6)
    assert len(prediction(model, family)) > 10
    assert prediction(out, family) == set()
    assert planned.after["bytes"] == pytest.approx(report.after["bytes"], rel=0.02)
    assert sum("are left out: module 0 lacks what joins it to the trunk" in one for one in report.warnings) == 1
    assert "left out" in caplog.text
    config = json.loads((out / "config.json").read_text())
    assert KEYS[family] is None or config[KEYS[family]] == 0
    subprocess.run([sys.executable, "-c", IN_STOCK, str(out)], check=True)


def test_per_task_checkpoints_leave_them_out(text: DataOptions, tmp_path: Path) -> None:
    model = with_prediction_layer("glm4_moe", tmp_path / "model")
    ids = torch.randint(2, 128, (16, 16), generator=torch.Generator().manual_seed(4))
    save_file({"input_ids": ids}, tmp_path / "other.safetensors")
    both = DataOptions(data=[*text.data, f"b={tmp_path / 'other.safetensors'}"], seq_len=16, batch_size=8)
    options = RouteOptions(keep=6, classifier="none", report=False, refit="none")
    route_tasks(model, tmp_path / "out", options, both, CPU, Writing(verify=False))
    assert prediction(tmp_path / "out" / "a", "glm4_moe") == set()


@pytest.mark.parametrize("verb", ["all experts", "quantize"])
def test_where_the_number_of_experts_stays_they_stay(verb: str, text: DataOptions, tmp_path: Path) -> None:
    model, out = with_prediction_layer("deepseek_v3", tmp_path / "model"), tmp_path / "out"
    if verb == "quantize":
        quantize(model, out, QuantizeOptions(group_size=8), text, ForwardOptions(device="cpu"), Writing(verify=False))
    else:
        reduce("prune", model, out, text, method="reap", target=8)
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert prediction(out, "deepseek_v3") == prediction(model, "deepseek_v3")
    assert all(torch.equal(before[name], after[name]) for name in prediction(model, "deepseek_v3"))
    config = json.loads((out / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    ignored = " ".join(config.get("quantization_config", {}).get("ignore", []))
    assert verb != "quantize" or f"layers.{LAYERS}." in ignored.replace("\\", "")
