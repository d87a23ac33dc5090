"""inspect against transformers' own count of the same models, and against headers made by hand."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from moetools.architectures.kv_cache import kv_cache_bytes
from moetools.errors import CheckpointError, UnsupportedModelError
from moetools.verbs.inspect.verb import inspect

SHARED = Path(__file__).parents[4] / "shared"
REFERENCE = SHARED / "models" / "mixtral-8x9m"


def stock_model(path: Path) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)


def stock_experts(model: Any) -> dict[int, int]:
    """Elements of the experts of every decoder layer that has some."""
    return {
        int(name.split("layers.")[1].split(".")[0]): sum(tensor.numel() for tensor in module.parameters())
        for name, module in model.named_modules()
        if name.endswith(".experts")
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_counts_are_those_of_the_stock_model(family: str, tmp_path: Path) -> None:
    summary = inspect(make_tiny(family, tmp_path / family))
    model = stock_model(tmp_path / family)
    on_disk = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
    experts = stock_experts(model)
    total, routed = sum(on_disk.values()), sum(experts.values())

    assert summary.parameters == total
    assert summary.moe_layers == tuple(experts)
    assert summary.layers == 3
    assert summary.parts["experts"].parameters == routed
    assert (summary.experts, summary.top_k) == (
        8,
        {"mixtral": 2, "qwen2_moe": 4, "qwen3_moe": 2, "phimoe": 2}.get(family, 3),
    )
    assert summary.active_parameters == total - routed + routed // 8 * summary.top_k
    assert (summary.expert_width, summary.hidden_size) == (24, 32)
    assert summary.described == (family != "flex_olmo")
    assert summary.weight_bytes == sum(size.bytes for size in summary.dtypes.values())
    assert summary.file_bytes == (tmp_path / family / "model.safetensors").stat().st_size
    assert summary.serving_bytes["fp32"] == 4 * total
    assert summary.serving_bytes["bf16"] == 2 * total
    assert json.loads(json.dumps(summary.to_json()))["parameters"] == total
    assert [len(row) for table in summary.tables() for row in table.rows] == [
        len(table.columns) for table in summary.tables() for _ in table.rows
    ]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "glm4_moe", "gpt_oss", "olmoe", "minimax_m2"])
def test_cache_is_as_large_as_the_stock_cache(family: str, tmp_path: Path) -> None:
    make_tiny(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(2, 12)[None], use_cache=True).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["num_hidden_layers"]
    assert kv_cache_bytes(config, layers, 10) == stored
    assert inspect(tmp_path).kv_cache_bytes == kv_cache_bytes(config, layers, 1000)


def test_latent_attention_caches_the_latent_and_the_rotary_part(tmp_path: Path) -> None:
    assert inspect(make_tiny("deepseek_v3", tmp_path)).kv_cache_bytes == 3 * (16 + 8) * 2 * 1000


@pytest.mark.parametrize(
    ("family", "shared"), [("mixtral", 0), ("qwen2_moe", 1), ("deepseek_v3", 1), ("ernie4_5_moe", 1)]
)
def test_shared_experts_and_groups(family: str, shared: int, tmp_path: Path) -> None:
    summary = inspect(make_tiny(family, tmp_path))
    assert summary.shared_experts == shared
    assert summary.groups == (2 if family == "deepseek_v3" else 1)


def test_narrow_serving_keeps_router_embeddings_and_norms_in_16_bits(tmp_path: Path) -> None:
    summary = inspect(make_tiny("mixtral", tmp_path))
    rest = 2 * 128 * 32 + 3 * 8 * 32 + 7 * 32
    assert summary.serving_bytes["int4"] == (summary.parameters - rest) // 2 + 2 * rest
    assert summary.serving_bytes["int8"] == (summary.parameters - rest) + 2 * rest


def test_extra_tensors_are_counted_apart(tmp_path: Path) -> None:
    make_tiny("deepseek_v3", tmp_path)
    before = inspect(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {f"model.layers.3.mlp.experts.{i}.up_proj.weight": torch.zeros(24, 32) for i in range(5)}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    summary = inspect(tmp_path)
    assert (summary.parameters, summary.moe_layers) == (before.parameters, (1, 2))
    assert (summary.extra.tensors, summary.extra.parameters, summary.extra.bytes) == (5, 5 * 24 * 32, 5 * 24 * 32 * 4)
    assert "F32" not in summary.dtypes
    assert summary.tables()[1].rows[0][0] in ("extra (carried over)", "experts")


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the shared reference model is not here")
def test_the_reference_model() -> None:
    summary = inspect(REFERENCE)
    assert round(summary.parameters / 1e6, 2) == 9.05
    assert summary.active_parameters == summary.parameters - 4 * 6 * 3 * 384 * 192
    assert (summary.layers, summary.experts, summary.top_k, summary.expert_width) == (4, 8, 2, 384)
    assert summary.tables()[0].rows[7] == ["parameters", "9,051,840"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_local_experts": 6}, ["num_local_experts 6", "layer 0 has 8 experts"]),
        ({"num_local_experts": 9}, ["num_local_experts 9", "layer 0 has 8 experts"]),
        ({"num_hidden_layers": 5}, ["num_hidden_layers 5", "3 layers are on disk", "layer 3 is not"]),
        ({"num_hidden_layers": "three"}, ["num_hidden_layers 'three'"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok 9", "only 8 experts"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok 0"]),
        ({"intermediate_size": 25}, ["intermediate_size 25", "w1.weight' is [24, 32]"]),
        ({"vocab_size": 129}, ["vocab_size 129", "embed_tokens.weight' is [128, 32]"]),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(changes: dict, named: list[str], tmp_path: Path) -> None:
    edit_config(make_tiny("mixtral", tmp_path), changes)
    with pytest.raises(CheckpointError) as caught:
        inspect(tmp_path)
    assert all(text in caught.value.message for text in named), caught.value.message


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_fused_experts_are_counted_by_their_first_dimension(family: str, tmp_path: Path) -> None:
    edit_config(make_tiny(family, tmp_path), {"num_local_experts": 7})
    with pytest.raises(CheckpointError, match="num_local_experts 7, but layer 0 has 8 experts"):
        inspect(tmp_path)


def test_a_missing_expert_is_found(tmp_path: Path) -> None:
    make_tiny("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.2.mlp.experts.3." not in name}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="layer 2 has 7 experts on disk"):
        inspect(tmp_path)


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    """As students of distillation are; also one of a family whose config counts experts that no layer has."""
    config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    mistral = MistralForCausalLM(MistralConfig(**config, num_key_value_heads=2, vocab_size=32))
    mistral.save_pretrained(tmp_path / "mistral")
    found = inspect(tmp_path / "mistral")
    assert (found.experts, found.top_k, found.moe_layers, found.expert_width) == (0, None, (), 24)
    assert found.active_parameters == found.parameters == sum(one.numel() for one in mistral.parameters())
    assert ["family", "mistral, dense"] in found.tables()[0].rows
    sizes = {"first_k_dense_replace": 4, "num_hidden_layers": 4}
    make_tiny("deepseek_v3", tmp_path / "deepseek", **sizes)
    found = inspect(tmp_path / "deepseek")
    assert (found.experts, found.moe_layers) == (0, ())


def test_no_model_at_all_is_refused(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 2}')
    with pytest.raises(UnsupportedModelError, match="no model_type"):
        inspect(tmp_path)


def test_packed_weights_are_named_and_not_taken_for_parameters(tmp_path: Path) -> None:
    make_tiny("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        shape = tensors.pop(name).shape
        tensors[name.replace("weight", "weight_packed")] = torch.zeros(shape[0], shape[1] // 8, dtype=torch.int32)
        tensors[name.replace("weight", "weight_scale")] = torch.zeros(shape[0], 1, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}
    stated = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    edit_config(tmp_path, {"quantization_config": stated})

    summary = inspect(tmp_path)
    assert summary.quantization == {"method": "compressed-tensors", "format": "pack-quantized", "bits": 4}
    assert summary.serving_bytes == {"as stored": sum(tensor.nbytes for tensor in tensors.values())}
    assert summary.dtypes["I32"].parameters == 3 * 8 * (2 * 24 * 4 + 32 * 3)
    overview = summary.tables()[0]
    assert "packed" in overview.note
    assert overview.rows[7][0] == "stored elements"
    assert overview.rows[-1] == ["quantized", "method compressed-tensors, format pack-quantized, bits 4"]


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    make_tiny("mixtral", tmp_path)
    program = (
        "import sys; from pathlib import Path; from moetools.verbs.inspect.verb import inspect\n"
        "summary = inspect(Path(sys.argv[1])); summary.tables(); summary.to_json()\n"
        "print([name for name in ('torch', 'transformers', 'safetensors', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_680_billion_parameters(tmp_path: Path) -> None:
    """Nothing but 3 MB of headers is read; how long it takes: tests/benchmarks/bench_inspect.py."""
    layers, experts, hidden, width = 60, 256, 7168, 2048
    config = {"model_type": "qwen3_moe", "num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": 8}
    config |= {"hidden_size": hidden, "moe_intermediate_size": width, "vocab_size": 1000}
    weight_map = {}
    for layer in range(layers):
        shapes = {f"model.layers.{layer}.self_attn.q_proj.weight": (hidden, hidden)}
        for expert in range(experts):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            shapes |= {prefix + f"{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
            shapes[prefix + "down_proj.weight"] = (hidden, width)
        weight_map |= write_sparse(tmp_path, f"model-{layer:05d}.safetensors", shapes)
    weight_map |= write_sparse(tmp_path, "model-rest.safetensors", {"model.embed_tokens.weight": (1000, hidden)})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(config))

    summary = inspect(tmp_path)
    routed = layers * experts * 3 * hidden * width
    assert summary.parts["experts"].parameters == routed
    assert summary.active_parameters == routed // 32 + layers * hidden**2 + 1000 * hidden


def edit_config(path: Path, changes: dict[str, Any]) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def write_sparse(folder: Path, name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """A bf16 safetensors file whose tensors are a hole; returns its part of the index."""
    header, end = {}, 0
    for tensor, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / name).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return dict.fromkeys(shapes, name)
