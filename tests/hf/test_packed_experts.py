"""`load_packed`: experts stay packed in memory, for every family and every payload, and compute the same numbers."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moetools.hf
from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import CheckpointError, UnsupportedModelError, UserError
from moetools.formats.layouts.moetools import FORMAT
from moetools.forward.experts import use_experts
from moetools.grids.base import Grid, Quantized, make_grid
from moetools.hf.expert_cache import ExpertCache
from moetools.hf.packed_experts import PackedExperts

sys.path.append(str(Path(__file__).parents[1] / "formats"))

from lanes_writer import pack as pack_lanes

IDS = torch.arange(24).reshape(2, 12)
EXPERTS = (".experts.", "input_linear", "output_linear")
CODED = make_grid({"kind": "entropy", "rate": 6.0, "step": 0.004})


def whole(name: str) -> Grid:
    """Everything entropy coded."""
    return CODED


def mixed(name: str) -> Grid:
    """Downs and a part of the others as integers."""
    coded = "gate" in name or "w1" in name or "input_linear" in name
    return CODED if coded else make_grid({"kind": "integer", "bits": 5, "group_size": 8, "symmetric": False})


def write(
    source: Path, folder: Path, choose: Callable[[str], Grid] = whole, *, lanes: bool = False
) -> tuple[Path, Path]:
    """A copy of a checkpoint with packed experts, and a plain one with the weights that they mean."""
    packed, plain = shutil.copytree(source, folder / "packed"), shutil.copytree(source, folder / "plain")
    stored, meant, grids = {}, {}, {}
    transposed = json.loads((source / "config.json").read_text())["model_type"] == "gpt_oss"
    for name, tensor in load_file(source / "model.safetensors").items():
        stored[name] = meant[name] = tensor
        if any(part in name for part in EXPERTS) and not name.endswith("bias") and tensor.dim() > 1:
            turned = tensor.transpose(-2, -1) if transposed else tensor
            quantized = choose(name).quantize(turned.float().reshape(-1, *turned.shape[-2:]))
            stored |= pack(name, quantized, tensor.dtype, transposed=transposed, lanes=lanes)
            value = quantized.dequantize().to(tensor.dtype).reshape(turned.shape)
            meant[name] = (value.transpose(-2, -1) if transposed else value).contiguous()
            grids[name] = choose(name)
            del stored[name]
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    save_file(meant, plain / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(source)
    config = checkpoint.config | {"quantization_config": FORMAT.config(grids, checkpoint)}
    (packed / "config.json").write_text(json.dumps(config))
    return packed, plain


def pack(name: str, quantized: Quantized, dtype: torch.dtype, *, transposed: bool, lanes: bool) -> dict[str, Any]:
    if not lanes:
        return FORMAT.pack(name, quantized, dtype, transposed=transposed)
    assert len(quantized.codes_BOI) == 1
    return pack_lanes(name, quantized)


def ours(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The plain model with moetools' kernel, whose sums have one order."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    use_experts(model)
    return model


@pytest.mark.parametrize("choose", [whole, mixed])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_computes_the_same(family: str, choose: Callable[[str], Grid], tiny, tmp_path: Path) -> None:
    packed, plain = write(tiny(family), tmp_path, choose)
    expected, found = ours(plain), moetools.hf.load_packed(packed, dtype=torch.float32)
    layers = [module for module in found.modules() if isinstance(module, PackedExperts)]
    assert layers
    assert torch.equal(found(IDS).logits, expected(IDS).logits)
    stock = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    assert torch.allclose(found(IDS).logits, stock(IDS).logits, atol=1e-5)
    fused = {name for name, _ in found.named_parameters() if "experts." in name and "shared" not in name}
    assert not {name for name in fused if not name.endswith("bias")}


def test_files_of_the_older_layout(tiny, tmp_path: Path) -> None:
    packed, plain = write(tiny("mixtral"), tmp_path, lanes=True)
    assert torch.equal(moetools.hf.load_packed(packed, dtype=torch.float32)(IDS).logits, ours(plain)(IDS).logits)


def test_experts_take_the_bytes_of_their_code(tiny, tmp_path: Path) -> None:
    """Of matrices that are large enough for the tables not to matter."""
    source = tiny("mixtral", hidden_size=128, intermediate_size=192)
    packed, plain = write(source, tmp_path)
    found = moetools.hf.load_packed(packed, dtype=torch.bfloat16)
    held = sum(buffer.nbytes for name, buffer in found.named_buffers() if ".experts." in name)
    disk = sum(t.nbytes for name, t in load_file(packed / "model.safetensors").items() if "entropy" in name)
    dense = sum(t.nbytes for name, t in load_file(plain / "model.safetensors").items() if ".experts." in name)
    assert held < 1.2 * disk < 0.6 * dense


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_cache_changes_no_number(family: str, tiny, tmp_path: Path) -> None:
    packed, plain = write(tiny(family), tmp_path)
    expected = ours(plain)(IDS).logits
    model = moetools.hf.load_packed(packed, dtype=torch.float32, cache_bytes="1MB")
    assert torch.equal(model(IDS).logits, expected)
    first = model.moetools_cache.misses
    assert torch.equal(model(IDS).logits, expected)
    assert (model.moetools_cache.misses, model.moetools_cache.hits) == (first, first)
    small = moetools.hf.load_packed(packed, dtype=torch.float32, cache_bytes=20_000)
    for _ in range(3):
        assert torch.equal(small(IDS).logits, expected)
    assert 0 < small.moetools_cache.nbytes <= 20_000


def test_a_model_in_another_dtype_does_not_get_what_was_kept(tiny, tmp_path: Path) -> None:
    packed, plain = write(tiny("mixtral"), tmp_path)
    model = moetools.hf.load_packed(packed, dtype=torch.float32, cache_bytes="1MB")
    model(IDS)
    expected = ours(plain).to(torch.bfloat16)(IDS).logits
    assert torch.equal(model.to(torch.bfloat16)(IDS).logits, expected)


def test_no_tokens_and_slots_of_no_expert(tiny, tmp_path: Path) -> None:
    packed, plain = write(tiny("mixtral"), tmp_path)
    model, expected = moetools.hf.load_packed(packed, dtype=torch.float32), ours(plain)
    layer, other = model.model.layers[0].mlp.experts, expected.model.layers[0].mlp.experts
    hidden_TD = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    assert layer(hidden_TD[:0], torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)).shape == (0, 32)
    elsewhere, weights = torch.tensor([[1, 8], [8, 8], [3, 1], [8, 2]]), torch.ones(4, 2)
    found = layer(hidden_TD, elsewhere, weights)
    here = other(hidden_TD, elsewhere.clamp(max=7), (elsewhere < 8).float())
    assert torch.allclose(found, here, atol=1e-6)


def test_generation_uses_the_experts(tiny, tmp_path: Path) -> None:
    packed, plain = write(tiny("mixtral"), tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    model = moetools.hf.load_packed(packed, dtype=torch.float32, cache_bytes=100_000)
    assert torch.equal(model.generate(IDS, **options), ours(plain).generate(IDS, **options))
    assert model.moetools_cache.hits > 0


def test_the_least_recently_used_goes_first() -> None:
    cache, device = ExpertCache(100), torch.device("cpu")
    values = {key: torch.zeros(10) + key for key in range(4)}
    cache.put(0, values[0])
    cache.put(1, values[1])
    assert cache.take(0, device, torch.float32) is values[0]
    cache.put(2, values[2])
    assert [key in cache for key in range(3)] == [True, False, True]
    assert cache.take(1, device, torch.float32) is None
    assert cache.take(2, device, torch.bfloat16) is None
    cache.put(3, torch.zeros(26))
    assert 3 not in cache
    cache.put(0, torch.zeros(25))
    assert (cache.nbytes, 2 in cache) == (100, False)
    cache.clear()
    assert (cache.nbytes, 0 in cache) == (0, False)


@pytest.mark.parametrize("value", [-1, "many", 1.5])
def test_sizes_that_do_not_exist(value: Any, tiny) -> None:
    with pytest.raises(UserError):
        moetools.hf.load_packed(tiny("mixtral"), cache_bytes=value)


def test_a_plain_model_is_refused_before_it_is_loaded(tiny) -> None:
    with pytest.raises(UnsupportedModelError, match="not packed in moetools' own format"):
        moetools.hf.load_packed(tiny("mixtral"))


def test_a_layer_that_is_packed_in_part_is_refused(tiny, tmp_path: Path) -> None:
    packed, _ = write(tiny("mixtral"), tmp_path)
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    config = json.loads((packed / "config.json").read_text())
    for group in config["quantization_config"]["groups"]:
        group["tensors"] = [one for one in group["tensors"] if one != name]
    del tensors[f"{name}_entropy"]
    tensors[name] = torch.zeros(32, 24, dtype=torch.bfloat16)
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"layers.1.*some of its matrices are packed"):
        moetools.hf.load_packed(packed)


def test_attention_alone_is_nothing_to_keep(tiny, tmp_path: Path) -> None:
    packed, _ = write(tiny("mixtral"), tmp_path)
    source = tiny("mixtral")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors |= FORMAT.pack(name, CODED.quantize(tensors.pop(name).float()[None]))
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(source)
    config = checkpoint.config | {"quantization_config": FORMAT.config({name: CODED}, checkpoint)}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="no layer whose experts can stay packed"):
        moetools.hf.load_packed(packed)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "gpt_oss"])
def test_a_damaged_stream_is_an_error_while_loading(family: str, tiny, tmp_path: Path) -> None:
    packed, _ = write(tiny(family), tmp_path)
    tensors = load_file(packed / "model.safetensors")
    name = max(one for one in tensors if "_entropy" in one)
    tensors[name][-1] ^= 1
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="its checksum is wrong"):
        moetools.hf.load_packed(packed)


@pytest.mark.gpu
def test_experts_stay_packed_on_a_gpu(tiny, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    packed, plain = write(tiny("mixtral"), tmp_path)
    model = moetools.hf.load_packed(packed, dtype=torch.float32, cache_bytes="1MB").cuda()
    found = model(IDS.cuda()).logits.cpu()
    assert torch.allclose(found, ours(plain)(IDS).logits, atol=1e-4)
