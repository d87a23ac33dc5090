"""Layouts that others publish: decoded as their formulas say, and every verb makes of them what it makes of the dense
checkpoint that they stand for."""

import json
from pathlib import Path

import published
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from moetools.checkpoint.reader import Checkpoint, open_checkpoint
from moetools.errors import CheckpointError
from moetools.formats.base import UnknownPackingError
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.training.options import TrainOptions
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.distill.verb import distill
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate
from moetools.verbs.inspect.verb import inspect
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.quantize.verb import quantize
from moetools.verbs.reduce.options import MergeOptions, PruneOptions
from moetools.verbs.reduce.verb import merge_experts, prune_experts
from moetools.verbs.route.options import RouteOptions
from moetools.verbs.route.verb import route_tasks

CPU = ForwardOptions(device="cpu")


def write_text(folder: Path, *tasks: str) -> DataOptions:
    for seed, task in enumerate(tasks):
        ids = torch.randint(2, 128, (24, 24), generator=torch.Generator().manual_seed(seed))
        save_file({"input_ids": ids}, folder / f"{task}.safetensors")
    return DataOptions(data=[f"{task}={folder / task}.safetensors" for task in tasks], seq_len=24, batch_size=8)


def everything(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return checkpoint.read(checkpoint.tensors)


def same_weights(one: Path, other: Path) -> bool:
    found, wanted = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert found.keys() == wanted.keys()
    return all(found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", published.CASES)
def test_values_are_those_of_the_formula(name: str, tiny, tmp_path: Path) -> None:
    packed, dense = published.case(name, tiny, tmp_path)
    view, plain = open_model(packed), open_checkpoint(dense)
    assert isinstance(view, PackedCheckpoint)
    assert view.packed
    found, wanted = everything(view), everything(plain)
    assert list(found) == list(wanted)
    for tensor, value in wanted.items():
        assert view.tensors[tensor].shape == plain.tensors[tensor].shape
        assert found[tensor].dtype == value.dtype, tensor
        assert torch.equal(found[tensor], value), tensor


def test_gpt_oss_is_what_transformers_loads(tiny, tmp_path: Path) -> None:
    packed, _ = published.case("mxfp4", tiny, tmp_path)
    how = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=how, dtype=torch.bfloat16)
    found = everything(open_model(packed))
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ["gptq", "awq", "mxfp4", "fp8-deepseek"])
def test_verbs_make_of_it_what_they_make_of_the_dense_one(name: str, tiny, tmp_path: Path) -> None:
    text, losses = write_text(tmp_path, "text"), []
    for model in published.case(name, tiny, tmp_path):
        # The outputs are the same, so stock transformers needs to load one of them.
        writing = Writing(verify=model.name == "packed")
        losses.append(evaluate([model], EvaluateOptions(), text, CPU).models[0].metrics.perplexity)
        pruned = tmp_path / f"{model.name}-pruned"
        report = prune_experts(model, pruned, PruneOptions(keep=6, output_format="bf16"), text, CPU, writing)
        said = report.precision
        assert said.startswith("written as bfloat16; the input was ") if model.name == "packed" else not said
        assert said in (pruned / "README.md").read_text()
        assert report.verified == writing.verify
        merge_experts(model, tmp_path / f"{model.name}-merged", MergeOptions(to=6), text, CPU, writing)
    assert losses[0] == losses[1]
    for verb in ("pruned", "merged"):
        assert same_weights(tmp_path / f"packed-{verb}", tmp_path / f"plain-{verb}")
        assert "quantization_config" not in json.loads((tmp_path / f"packed-{verb}/config.json").read_text())


def test_other_verbs_too(tiny, tmp_path: Path) -> None:
    text = write_text(tmp_path, "one", "two")
    for model in published.case("gptq", tiny, tmp_path):
        writing = Writing(verify=False)
        out = {verb: tmp_path / f"{model.name}-{verb}" for verb in ("quantized", "student", "tasks", "healed")}
        options = QuantizeOptions(method="rtn", scheme="w8a16")
        assert quantize(model, out["quantized"], options, text, CPU, writing).notes[:1] == (
            [] if model.name == "plain" else ["from gptq (56 tensors integer4 per 16 columns)"]
        )
        distill(model, out["student"], StudentOptions(), TrainOptions(steps=2), text, CPU, writing)
        route_tasks(model, out["tasks"], RouteOptions(keep=6, refit="none", output_format="bf16"), text, CPU, writing)
        prune_experts(model, out["healed"], PruneOptions(keep=6, heal=2), text, CPU, writing)
    for verb in ("quantized", "student", "tasks/one", "healed"):
        assert same_weights(tmp_path / f"packed-{verb}", tmp_path / f"plain-{verb}"), verb


def test_kimi_k2_is_deepseek_v3(tiny, tmp_path: Path) -> None:
    packed, _ = published.case("fp8-deepseek", tiny, tmp_path)
    config = json.loads((packed / "config.json").read_text())
    own = {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    (packed / "config.json").write_text(json.dumps(config | own))
    assert inspect(packed).described
    prune_experts(packed, tmp_path / "out", PruneOptions(keep=6), write_text(tmp_path, "text"), CPU, Writing())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.n_routed_experts == 6


def test_quantization_that_the_text_part_states(tiny, tmp_path: Path) -> None:
    packed, _ = published.case("awq", tiny, tmp_path)
    config = json.loads((packed / "config.json").read_text())
    stated = config.pop("quantization_config")
    (packed / "config.json").write_text(
        json.dumps({"model_type": "wrapper", "text_config": config | {"quantization_config": stated}})
    )
    view = open_model(packed)
    assert isinstance(view, PackedCheckpoint)
    assert view.format_name == "awq"
    assert view.config == {"model_type": "wrapper", "text_config": config}


Q = "model.layers.0.self_attn.q_proj"
DAMAGE = {
    "gptq: fewer scales": ("gptq", f"{Q}.scales", lambda t: t[1:].clone(), "do not fit 4 bits"),
    "gptq: other zeros": ("gptq", f"{Q}.qzeros", lambda t: t[:, 1:].clone(), "do not fit 4 bits"),
    "gptq: short g_idx": ("gptq", f"{Q}.g_idx", lambda t: t[1:].clone(), "do not fit 4 bits"),
    "gptq: g_idx outside": ("gptq", f"{Q}.g_idx", lambda t: t + 1, "g_idx is outside of its 4 groups"),
    "gptq: negative g_idx": ("gptq", f"{Q}.g_idx", lambda t: t - 1, "g_idx is outside of its 4 groups"),
    "awq: fewer words": ("awq", f"{Q}.qweight", lambda t: t[:, 1:].clone(), "do not fit 4 bits"),
    "awq: words of bytes": ("awq", f"{Q}.qweight", lambda t: t.view(torch.uint8), "not a matrix of I32"),
    "awq: infinite scale": ("awq", f"{Q}.scales", lambda t: t / 0, "a scale is not finite"),
    "awq: no zeros": ("awq", f"{Q}.qzeros", None, "has no '.*qzeros' beside it"),
    "nvfp4: two scales": ("nvfp4", f"{Q}.weight_scale_2", lambda t: t.repeat(2), "is no NVFP4"),
    "nvfp4: short scale": ("nvfp4", f"{Q}.weight_scale", lambda t: t[:, 1:].clone(), "is no NVFP4"),
    "fp8: two scales": ("modelopt-fp8", f"{Q}.weight_scale", lambda t: t.repeat(2), "is no FP8 with one scale"),
    "fp8: infinite scale": ("modelopt-fp8", f"{Q}.weight_scale", lambda t: t / 0, "a scale is not finite"),
    "v4: more blocks": ("deepseek-v4", f"{Q}.scale", lambda t: torch.cat([t, t]), "is no float8_block"),
    "fp8: fewer blocks": ("fp8-qwen", f"{Q}.weight_scale_inv", lambda t: t[:, 1:].clone(), "is not read here"),
    "mxfp4: short scales": (
        "mxfp4", "model.layers.0.mlp.experts.down_proj_scales", lambda t: t[:, 1:].clone(), "are no MXFP4",
    ),
    "mxfp4: largest scale": (
        "mxfp4", "model.layers.0.mlp.experts.down_proj_scales", lambda t: t * 0 + 255, "a scale is not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, tiny, tmp_path: Path) -> None:
    name, part, change, message = DAMAGE[damage]
    packed, _ = published.case(name, tiny, tmp_path)
    tensors = load_file(packed / "model.safetensors")
    whole = tensors.pop(part)
    save_file(tensors | ({} if change is None else {part: change(whole)}), packed / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        everything(open_model(packed))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gptq", {"bits": 3}),
        ("gptq", {"group_size": 0}),
        ("gptq", {"group_size": None}),
        ("awq", {"version": "gemv"}),
        ("awq", {"zero_point": False}),
        ("nvfp4", {"quant_algo": "MIXED_PRECISION"}),
    ],
)
def test_variants_that_are_not_read_are_named(name: str, config: dict, tiny, tmp_path: Path) -> None:
    packed, _ = published.case(name, tiny, tmp_path)
    stated = json.loads((packed / "config.json").read_text())
    stated["quantization_config"] |= config
    (packed / "config.json").write_text(json.dumps(stated))
    with pytest.raises(UnknownPackingError, match="not read here"):
        open_model(packed)


def test_modelopt_says_in_a_file_of_its_own_how_weights_are_packed(tiny, tmp_path: Path) -> None:
    packed, _ = published.case("modelopt-fp8", tiny, tmp_path)
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (packed / "config.json").write_text(json.dumps(config))
    stated = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (packed / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, **stated}))
    view = open_model(packed)
    assert isinstance(view, PackedCheckpoint)
    assert view.format_name == "fp8-tensor"
    assert view.quantization == {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "ignore": ["lm_head"],
    }


def test_bitsandbytes_is_refused_with_the_reason(tiny, tmp_path: Path) -> None:
    packed, _ = published.case("awq", tiny, tmp_path)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(
        UnknownPackingError, match="bitsandbytes makes such codes while it loads a checkpoint"
    ) as caught:
        open_model(packed)
    assert caught.value.hint == "start from the unquantized checkpoint"
