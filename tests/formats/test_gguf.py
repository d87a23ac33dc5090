"""GGUF files hold what was meant: read back with the gguf package, independent of how we packed them."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from packing import among, write_packed
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import CheckpointError, MoetoolsError, UnsupportedModelError, UserError
from moetools.formats.base import load_format
from moetools.formats.reader import open_model
from moetools.grids.base import Grid, make_grid

gguf = pytest.importorskip("gguf")

import moetools  # noqa: E402
from moetools.formats.gguf import check_gguf, export_gguf, read_gguf  # noqa: E402
from moetools.formats.gguf_blocks import decoded_blocks, encode_blocks, kind_of  # noqa: E402

WORDS = ["<|endoftext|>", "a", "b", "c", "ab", "abc"]
SHAPES = {"mixtral": ("w1", "w2", "w3"), "other": ("gate_proj", "down_proj", "up_proj")}


def with_tokenizer(source: Path, folder: Path) -> Path:
    """A copy with a byte-level BPE tokenizer of 128 tokens."""
    out = shutil.copytree(source, folder)
    vocabulary = WORDS + [f"x{index}" for index in range(120)]
    model = {
        "type": "BPE",
        "vocab": {token: index for index, token in enumerate(vocabulary)},
        "merges": [["a", "b"], ["ab", "c"]],
    }
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": 0, "content": WORDS[0], "special": True, **plain}]
    pre = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True}
    (out / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added, "pre_tokenizer": pre}))
    return out


def sizes(family: str, width: int) -> dict:
    options = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    options |= {
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "tie_word_embeddings": family == "qwen2_moe",
    }
    if family == "qwen2_moe":
        options |= {"mlp_only_layers": [], "shared_expert_intermediate_size": width}
    if family == "olmoe":
        options |= {"num_key_value_heads": 4}
    if family in ("mixtral", "olmoe"):
        del options["moe_intermediate_size"]
    return options


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row 2 i + half of a head is row i of that half, written with loops."""
    size = len(weight) // heads
    rows = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[rows]


def made_grid(grid: dict) -> Grid:
    """Integers with fp16 scales, or the grid that is named."""
    return make_grid(grid if "kind" in grid else {"kind": "integer", "scale_dtype": "float16", **grid})


def layout_of(grid: dict) -> str:
    """The format that stores it."""
    return "moetools" if "bits" in grid or "type" in grid else grid["kind"]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_plain_tensors_are_all_there(family: str, tiny, tmp_path: Path) -> None:
    source = with_tokenizer(tiny(family, **sizes(family, 32)), tmp_path / "model")
    export_gguf(open_model(source), tmp_path / "out.gguf")
    found = {name: values for name, _, values in read_gguf(tmp_path / "out.gguf")}
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    experts = [name for name in tensors if ".experts." in name]
    assert len(found) == len(tensors) - len(experts) + 2 * 3 + (family == "qwen2_moe")
    stacked = {"gate": 0, "down": 1, "up": 2}
    leaf = SHAPES["mixtral" if family == "mixtral" else "other"]
    for layer in range(2):
        for role, place in stacked.items():
            pattern = re.compile(rf"layers\.{layer}\..*experts\.(\d+)\.{leaf[place]}\.weight")
            mine = {int(match[1]): tensors[name] for name in experts if (match := pattern.search(name))}
            expected = torch.stack([mine[index] for index in range(8)])
            assert np.array_equal(found[f"blk.{layer}.ffn_{role}_exps.weight"], expected)
        query, key = (tensors[f"model.layers.{layer}.self_attn.{one}_proj.weight"] for one in "qk")
        if family == "mixtral":
            query, key = permuted(query, 4), permuted(key, 2)
        assert np.array_equal(found[f"blk.{layer}.attn_q.weight"], query)
        assert np.array_equal(found[f"blk.{layer}.attn_k.weight"], key)
    assert np.array_equal(found["token_embd.weight"], tensors["model.embed_tokens.weight"])
    head = "model.embed_tokens.weight" if family == "qwen2_moe" else "lm_head.weight"
    assert np.array_equal(found["output.weight"], tensors[head])


@pytest.mark.parametrize(
    ("grid", "kind", "ternary"),
    [
        ({"bits": 8, "group_size": 32}, "Q8_0", "TQ2_0"),
        ({"bits": 5, "group_size": 64}, "Q5_0", "TQ2_0"),
        ({"bits": 4, "group_size": 32}, "Q4_0", "TQ2_0"),
        ({"bits": 3}, "Q4_0", "TQ2_0"),
        ({"bits": 2, "ternary": True, "group_size": 256}, "TQ2_0", "TQ2_0"),
        ({"bits": 2, "ternary": True}, "TQ1_0", "TQ1_0"),
        ({"kind": "mxfp4"}, "MXFP4", "TQ2_0"),
        ({"bits": 3, "symmetric": False, "group_size": 64, "scale_dtype": "bfloat16"}, "Q4_1", "TQ2_0"),
        *(({"kind": "kquant", "type": kind}, kind, "TQ2_0") for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")),
    ],
)
def test_codes_survive(grid: dict, kind: str, ternary: str, tiny, tmp_path: Path) -> None:
    """Dequantized by the gguf package, every weight is the one the stock loaders would have, scales in fp16."""
    options = {**sizes("mixtral", 256), "num_hidden_layers": 1, "num_local_experts": 2, "vocab_size": 128}
    source = with_tokenizer(tiny("mixtral", **options), tmp_path / "model")
    made = made_grid(grid)
    chosen = among((".experts.", "q_proj"), made)
    packed, intended = write_packed(source, tmp_path / "packed", load_format(layout_of(grid)), chosen)
    kinds = export_gguf(open_model(packed), tmp_path / "out.gguf", ternary=ternary)  # type: ignore[arg-type]
    assert kinds["blk.0.ffn_up_exps.weight"] == kinds["blk.0.attn_q.weight"] == kind
    found = {name: values for name, _, values in read_gguf(tmp_path / "out.gguf")}
    for expert in range(2):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"
        exact = open_model(packed).quantized(name).dequantize()[0]  # type: ignore[attr-defined]
        assert np.array_equal(found["blk.0.ffn_down_exps.weight"][expert], exact)
        assert torch.equal(exact.bfloat16(), intended[name])
    # Heads that were shuffled, not recoded.
    query = open_model(packed).quantized("model.layers.0.self_attn.q_proj.weight").dequantize()[0]  # type: ignore[attr-defined]
    assert np.array_equal(found["blk.0.attn_q.weight"], permuted(query, 4))


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        ({"bits": 4, "symmetric": False, "group_size": 64}, "Q4_1"),
        ({"bits": 5, "symmetric": False, "group_size": 64}, "Q5_1"),
        ({"bits": 4, "symmetric": False, "float_zero": True}, "Q4_1"),
    ],
)
def test_zeros_become_offsets_of_half_precision(grid: dict, kind: str) -> None:
    quantized = made_grid(grid).quantize(torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0)) + 0.3)
    assert kind_of(quantized.grid, 256, "TQ2_0") == kind
    blocks = encode_blocks(quantized, kind, "w").reshape(64, -1)
    found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found, decoded_blocks(quantized, kind))
    scale, zero = quantized.params.scale_BOG[0], quantized.params.zero_BOG[0]  # type: ignore[index]
    allowed = ((scale * zero).abs() * 2**-11).repeat_interleave(256 // scale.shape[1], dim=1)
    off = (torch.tensor(found) - quantized.dequantize()[0]).abs()
    assert (off <= allowed + 1e-6).all()
    recoded = gguf.quants.dequantize(
        gguf.quants.quantize(quantized.dequantize()[0].numpy(), gguf.GGMLQuantizationType[kind]),
        gguf.GGMLQuantizationType[kind],
    )
    assert off.square().sum() < (torch.tensor(recoded) - quantized.dequantize()[0]).square().sum()


@pytest.mark.parametrize(("bits", "kind", "bound"), [(2, "Q3_K", 2e-2), (3, "Q3_K", 2e-2), (6, "Q6_K", 5e-3)])
def test_scales_of_super_blocks_are_fitted(bits: int, kind: str, bound: float) -> None:
    """Codes survive; the scales' error is bounded, and no larger than a fine brute-force search over d leaves."""
    weight = 0.02 * torch.randn(1, 16, 512, generator=torch.Generator().manual_seed(0))
    quantized = made_grid({"bits": bits, "group_size": 16, "scale_dtype": "bfloat16"}).quantize(weight)
    assert kind_of(quantized.grid, 512, "TQ1_0") == kind
    found = gguf.quants.dequantize(encode_blocks(quantized, kind, "w").reshape(16, -1), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found, decoded_blocks(quantized, kind))
    exact = quantized.dequantize()[0]
    error = (torch.tensor(found) - exact).view(-1, 256).square().sum(1)
    assert error.sum().sqrt() < bound * exact.norm()
    limits = (-32, 31) if kind == "Q3_K" else (-128, 127)
    scale, codes = quantized.params.scale_BOG.view(-1, 16), quantized.codes_BOI.view(-1, 16, 16).float()
    least = torch.full_like(error, torch.inf)
    for d in torch.linspace(-1, 1, 1001)[:, None] * scale.abs().amax(1) / 16:
        step = d.half().float()[:, None]
        places = torch.where(step != 0, scale / step, 0.0).round().clamp(*limits)
        left = (codes * (step * places - scale)[..., None]).square().sum((1, 2))
        least = torch.minimum(least, left)
    assert error.sum() < 1.25 * least.sum()


KQUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("kind", KQUANTS)
def test_kquants_are_dequantized_alike_by_gguf(kind: str) -> None:
    """And rounding to them is closer than what llama.cpp 0.3.36's `ggml_quantize_chunk` made of such weights."""
    weight = 0.02 * torch.randn(1, 16, 512, generator=torch.Generator().manual_seed(0))
    weight[0, 0, :256] = 0
    quantized = make_grid({"kind": "kquant", "type": kind}).quantize(weight)
    blocks = encode_blocks(quantized, kind, "w").reshape(16, -1)
    found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found, quantized.dequantize()[0])
    assert np.array_equal(found, decoded_blocks(quantized, kind))
    assert not found[0, :256].any()
    share = {"Q2_K": 0.297, "Q3_K": 0.150, "Q4_K": 0.0715, "Q5_K": 0.0361, "Q6_K": 0.018}[kind]
    assert (torch.tensor(found) - weight[0]).norm() < share * weight.norm()


@pytest.mark.parametrize(
    ("bits", "size", "kind", "bound"), [(2, 16, "Q2_K", 6e-2), (4, 32, "Q4_K", 2e-2), (5, 32, "Q5_K", 2e-2)]
)
@pytest.mark.parametrize("turned", [False, True])
def test_offsets_of_super_blocks_are_fitted(bits: int, size: int, kind: str, bound: float, turned: bool) -> None:
    """Codes survive, whatever the signs of their scales, and what scales and offsets lose is bounded."""
    weight = 0.02 * torch.randn(1, 16, 512, generator=torch.Generator().manual_seed(0)) - 0.003
    grid = made_grid({"bits": bits, "group_size": size, "symmetric": False})
    quantized = grid.quantize(weight)
    if turned:
        flip = torch.arange(512 // size) % 3 == 0
        highest, scale, zero = 2**bits - 1, quantized.params.scale_BOG, quantized.params.zero_BOG
        params = type(quantized.params)(
            scale_BOG=torch.where(flip, -scale, scale), zero_BOG=torch.where(flip, highest - zero, zero)
        )
        codes = torch.where(flip.repeat_interleave(size), highest - quantized.codes_BOI, quantized.codes_BOI)
        quantized = type(quantized)(grid=grid, codes_BOI=codes.to(torch.uint8), params=params)
    assert kind_of(grid, 512, "TQ1_0") == kind
    found = gguf.quants.dequantize(encode_blocks(quantized, kind, "w").reshape(16, -1), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found, decoded_blocks(quantized, kind))
    exact = quantized.dequantize()[0]
    assert (torch.tensor(found) - exact).norm() < bound * exact.norm()


def test_structure_and_tokenizer(tiny, tmp_path: Path) -> None:
    source = with_tokenizer(tiny("qwen2_moe", **sizes("qwen2_moe", 32)), tmp_path / "model")
    export_gguf(open_model(source), tmp_path / "out.gguf")
    fields = gguf.GGUFReader(str(tmp_path / "out.gguf")).fields
    read = {key: field.contents() for key, field in fields.items()}
    expected = {
        "general.architecture": "qwen2moe",
        "qwen2moe.block_count": 2,
        "qwen2moe.expert_count": 8,
        "qwen2moe.expert_used_count": 4,
        "qwen2moe.expert_feed_forward_length": 32,
        "qwen2moe.attention.head_count_kv": 2,
        "qwen2moe.attention.key_length": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    assert {key: read[key] for key in expected} == expected
    assert read["tokenizer.ggml.tokens"][:6] == WORDS
    assert read["tokenizer.ggml.tokens"][126:] == ["[PAD126]", "[PAD127]"]
    assert read["tokenizer.ggml.token_type"][:2] == [3, 1]


def refused(tiny, tmp_path: Path, grid: dict | None = None, family: str = "mixtral", **config: object) -> MoetoolsError:
    source = with_tokenizer(
        tiny(family, **(sizes(family, 32) if family in ("mixtral", "olmoe") else {})), tmp_path / "m"
    )
    changed = json.loads((source / "config.json").read_text()) | config
    (source / "config.json").write_text(json.dumps(changed))
    checkpoint = open_checkpoint(source)
    names = [name for name in checkpoint.tensors if ".experts." in name]
    with pytest.raises(MoetoolsError) as caught:
        check_gguf(checkpoint, dict.fromkeys(names, make_grid(grid)) if grid else {})
    return caught.value


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_the_command_writes_families_with_fused_experts(family: str, tiny, tmp_path: Path) -> None:
    """No stock layout stores them: the checkpoint beside the file has moetools' own."""
    source = with_tokenizer(tiny(family, hidden_size=64, intermediate_size=64), tmp_path / "model")
    asked = {"method": "rtn", "scheme": "w4a16", "group_size": 32, "format": "gguf", "device": "cpu"}
    moetools.quantize(source, tmp_path / "out", **asked)
    assert any("exps" in str(found[0]) for found in read_gguf(tmp_path / "out/model.gguf"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "moetools"


def test_what_has_no_gguf_is_refused_up_front(tiny, tmp_path: Path) -> None:
    def run(*arguments, **options) -> MoetoolsError:
        return refused(tiny, tmp_path / str(len(list(tmp_path.iterdir()))), *arguments, **options)

    integer = {"kind": "integer", "bits": 4}
    error = run({"kind": "integer", "bits": 6, "symmetric": False, "group_size": 32})
    assert isinstance(error, UserError)
    assert "no type for" in error.message
    assert "`asymmetric`" in error.hint
    error = run({"kind": "integer", "bits": 2, "ternary": True})
    assert "TQ1_0 has blocks of 256 columns" in error.message
    assert error.hint == "`scheme=w4a16` `group_size=32`"
    assert "Q6_K has blocks of 256 columns" in run({**integer, "group_size": 16}).message
    assert run({**integer, "bits": 8, "group_size": 16}).hint == "`group_size=32`"
    assert isinstance(run(family="phimoe"), UnsupportedModelError)
    assert "rope type 'yarn'" in run(rope_parameters={"rope_type": "yarn"}).message
    assert "norm_topk_prob False" in run(family="olmoe", norm_topk_prob=True).message
    assert "key-value heads" in run(family="olmoe", num_key_value_heads=2).message


def test_a_tokenizer_is_needed(tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        check_gguf(checkpoint, {})
    source = with_tokenizer(tiny("mixtral"), tmp_path / "model")
    description = json.loads((source / "tokenizer.json").read_text())
    description["model"]["byte_fallback"] = True
    (source / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(UnsupportedModelError, match="only byte-level BPE"):
        check_gguf(open_checkpoint(source), {})


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_transformers_reads_the_file(family: str, tiny, stock, tmp_path: Path) -> None:
    """An independent reader of the same file; it has no Mixtral and no OLMoE."""
    source = with_tokenizer(tiny(family, **sizes(family, 64)), tmp_path / "model")
    export_gguf(open_model(source), tmp_path / "out.gguf")
    ids = torch.arange(2, 34)[None]
    config = AutoConfig.from_pretrained(source)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", config=config, dtype=torch.float32)
    assert torch.equal(found(ids).logits, stock(source)(ids).logits)


LLAMA = os.environ.get("MOETOOLS_LLAMA_PYTHON", "")
"""A Python with llama-cpp-python, in an environment of its own; the test skips itself without it."""
_RUN = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], logits_all=True, n_ctx=128, verbose=False, n_threads=1, type_k=0, type_v=0)
ids = json.loads(sys.argv[2])
model.eval(ids)
print(json.dumps(model.scores[: len(ids)].tolist()))
"""


def has_llama() -> bool:
    if not LLAMA:
        return False
    return subprocess.run([LLAMA, "-c", "import llama_cpp"], capture_output=True).returncode == 0


def llama_scores(file: Path, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [N, V] of llama.cpp."""
    command = [LLAMA, "-c", _RUN, str(file), json.dumps(ids)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-1000:]
    return torch.tensor(json.loads(ran.stdout.splitlines()[-1])).log_softmax(-1)


needs_llama = pytest.mark.skipif(not has_llama(), reason="no llama-cpp-python; set MOETOOLS_LLAMA_PYTHON")


@needs_llama
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_llama_cpp_computes_the_same_logits(family: str, tied: bool, tiny, stock, tmp_path: Path) -> None:
    options = sizes(family, 64) | {"tie_word_embeddings": tied}
    source = with_tokenizer(tiny(family, **options), tmp_path / "model")
    # In F32: llama.cpp rounds the activations in front of BF16 weights, enough to send tokens to other experts.
    exact = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(exact, source / "model.safetensors", metadata={"format": "pt"})
    export_gguf(open_model(source), tmp_path / "out.gguf")
    ids = list(range(2, 34))
    found = llama_scores(tmp_path / "out.gguf", ids)
    expected = stock(source)(torch.tensor([ids])).logits[0].detach()
    assert (found - expected.log_softmax(-1)).abs().max() < 0.01 * expected.std()


@needs_llama
@pytest.mark.parametrize(
    ("grid", "ternary"),
    [
        ({"bits": 8, "group_size": 32}, "TQ1_0"),
        ({"bits": 5, "group_size": 64}, "TQ1_0"),
        ({"bits": 4, "group_size": 32}, "TQ1_0"),
        ({"bits": 2, "ternary": True, "group_size": 256}, "TQ1_0"),
        ({"bits": 2, "ternary": True, "group_size": 256}, "TQ2_0"),
        ({"kind": "mxfp4"}, "TQ1_0"),
        ({"bits": 3, "group_size": 16}, "TQ1_0"),
        ({"bits": 6, "group_size": 16}, "TQ1_0"),
        ({"bits": 4, "symmetric": False, "group_size": 32}, "TQ1_0"),
        ({"bits": 5, "symmetric": False, "group_size": 32}, "TQ1_0"),
        ({"bits": 2, "symmetric": False, "group_size": 16}, "TQ1_0"),
        *(({"kind": "kquant", "type": kind}, "TQ1_0") for kind in KQUANTS),
    ],
)
def test_llama_cpp_computes_with_our_codes(grid: dict, ternary: str, tiny, stock, tmp_path: Path) -> None:
    """As stock transformers with the dequantized weights; every expert is used, so that rounding cannot reroute."""
    options = {**sizes("mixtral", 256), "num_local_experts": 2, "num_experts_per_tok": 2, "vocab_size": 128}
    source = with_tokenizer(tiny("mixtral", **options), tmp_path / "model")
    made = made_grid(grid)
    chosen = among((".experts.", "_proj", "embed_tokens"), made)
    packed, intended = write_packed(source, tmp_path / "packed", load_format(layout_of(grid)), chosen)
    export_gguf(open_model(packed), tmp_path / "out.gguf", ternary=ternary)  # type: ignore[arg-type]
    fitted = (kind_of(made, 256, "TQ1_0") or "").endswith("_K")
    if fitted:
        # The scales were fitted: what the blocks decode to, checked against the gguf package elsewhere.
        for name in open_model(packed).packed:  # type: ignore[attr-defined]
            quantized = open_model(packed).quantized(name)  # type: ignore[attr-defined]
            intended[name] = decoded_blocks(quantized, kind_of(made, 256, "TQ1_0") or "")
        intended = {name: tensor.float() for name, tensor in intended.items()}
    save_file(intended, source / "model.safetensors", metadata={"format": "pt"})
    ids = list(range(2, 34))
    found, expected = llama_scores(tmp_path / "out.gguf", ids), stock(source)(torch.tensor([ids])).logits[0].detach()
    off = (found - expected.log_softmax(-1)).abs()
    # Activations are rounded to 8 bits: per 32 columns, and in front of super-blocks per 256.
    assert off.mean() < (0.03 if fitted else 0.02) * expected.std()
    assert off.max() < 0.15 * expected.std()
