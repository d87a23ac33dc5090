"""Embeddings and head in codes: what is on disk, what loads, and what the head's Hessian is made of."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moetools.errors import UserError
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.forward.options import ForwardOptions
from moetools.grids.base import make_grid
from moetools.methods.quantize.base import Inputs
from moetools.methods.quantize.gptq import METHOD as GPTQ
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.quantize.report import QuantizationReport
from moetools.verbs.quantize.verb import quantize

CPU = ForwardOptions(device="cpu")
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LOADS = """
import sys, torch, transformers
import moetools.hf
from transformers import AutoModelForCausalLM
transformers.logging.disable_progress_bar()
ids = torch.arange(2, 42)[None]
logits = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)(ids).logits for path in sys.argv[1:]]
print("equal" if torch.equal(*logits) else (logits[0] - logits[1]).abs().max())
"""


@pytest.fixture
def text(tmp_path: Path) -> DataOptions:
    ids = torch.randint(2, 128, (32, 16), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": ids}, tmp_path / "tokens.safetensors")
    return DataOptions(data=[f"random={tmp_path}/tokens.safetensors"], seq_len=16, batch_size=8)


def run(model: Path, out: Path, text: DataOptions | None, **options: object) -> QuantizationReport:
    chosen = QuantizeOptions(**{"group_size": 8, "method": "gptq" if text else "rtn", **options})
    return quantize(model, out, chosen, text or DataOptions(), CPU, Writing(), command="moetools test")


def expand(model: Path, out: Path) -> QuantizationReport:
    return quantize(model, out, QuantizeOptions(expand=True), DataOptions(), CPU, Writing(), command="moetools test")


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "ternary", "sub1:2.5"])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_ends_load_as_their_expansion(scheme: str, tied: bool, tiny, text: DataOptions, tmp_path: Path) -> None:
    source = tiny("qwen2_moe", tie_word_embeddings=tied)
    report = run(source, tmp_path / "packed", text, scheme="w4a16", embeddings=scheme)
    assert report.verified
    assert report.format == "moetools"
    packed = open_model(tmp_path / "packed")
    assert isinstance(packed, PackedCheckpoint)
    assert {name for name in packed.packed if "layers" not in name} == ({EMBEDDINGS} if tied else {EMBEDDINGS, HEAD})
    expand(tmp_path / "packed", tmp_path / "plain")
    paths = [str(tmp_path / "packed"), str(tmp_path / "plain")]
    done = subprocess.run([sys.executable, "-c", LOADS, *paths], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["equal"], done.stdout + done.stderr
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    error = (before[EMBEDDINGS].float() - after[EMBEDDINGS].float()).square().sum() / before[EMBEDDINGS].square().sum()
    assert 0 < error < {"w4a16": 0.02, "w8a16": 1e-4, "ternary": 0.5, "sub1:2.5": 0.2}[scheme]


def test_the_head_is_solved_for_what_it_sees(tiny, text: DataOptions, tmp_path: Path) -> None:
    """The same codes as GPTQ by hand gives for the states in front of the head of the expanded model."""
    source = tiny("mixtral")
    run(source, tmp_path / "packed", text, scheme="w8a16", embeddings="w3a16")
    expand(tmp_path / "packed", tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ids = load_file(tmp_path / "tokens.safetensors")["input_ids"]
    with torch.no_grad():
        states = model.model(ids).last_hidden_state.flatten(0, 1)
    inputs = Inputs(hessian_BII=(states.T @ states / len(states))[None], count_B=torch.tensor([len(states)]))
    grid = make_grid({"kind": "integer", "bits": 3, "group_size": 8})
    weight = load_file(source / "model.safetensors")[HEAD].float()
    expected, _ = GPTQ.quantize(weight[None], grid, inputs)
    found = open_model(tmp_path / "packed").quantized(HEAD)  # type: ignore[attr-defined]
    same = (found.codes_BOI == expected.codes_BOI).float().mean()
    assert same > 0.99
    lost = {
        name: ((weight - one.dequantize()[0]) @ states.T).square().sum()
        for name, one in (("found", found), ("nearest", grid.quantize(weight[None])))
    }
    assert lost["found"] < 0.8 * lost["nearest"]


def test_attention_by_rate(tiny, text: DataOptions, tmp_path: Path) -> None:
    run(tiny("mixtral"), tmp_path / "out", text, scheme="sub1", bits=2.0, attention="sub1:3", group_size=None)
    packed = open_model(tmp_path / "out")
    assert isinstance(packed, PackedCheckpoint)
    grids = {name: one for name, one in packed.packed.items() if "self_attn" in name}
    assert grids
    assert all("_entropy" in part for one in grids.values() for part in one.parts.values())


def test_bad_requests(tiny, tmp_path: Path) -> None:
    def refused(**options: object) -> UserError:
        with pytest.raises(UserError) as caught:
            run(tiny("mixtral"), tmp_path / "out", None, **options)
        return caught.value

    assert "sub1:3" in refused(embeddings="sub1").hint
    assert "takes 0.3 to 6 bits" in refused(embeddings="sub1:9").message
    assert "only sub1 takes bits" in refused(attention="w4a16:3").message
    assert "unknown scheme 'w4'" in refused(embeddings="w4").message
    assert "contradict" in refused(embeddings="w4a16", experts_only=True).message
    assert "`format=moetools`" in refused(embeddings="w4a16", format="compressed-tensors").hint
    assert "vLLM does not read" in refused(embeddings="w4a16", target="vllm").message
    assert "nothing here has groups" in refused(scheme="w8a8", target="vllm").message
    assert "`scheme=fp8` has one scale per row" in refused(scheme="fp8-block").hint


def test_too_little_memory_is_refused_with_numbers(tiny, tmp_path: Path) -> None:
    source = tiny("mixtral", vocab_size=20000)
    options = QuantizeOptions(method="rtn", group_size=8, embeddings="w4a16")
    # Five copies in fp32 of 20,000 rows of 32.
    small = ForwardOptions(device="cpu", memory_budget=9_000_000)
    with pytest.raises(UserError, match=r"9\.00 MB is too small: .* 30\.72 MB for statistics and solvers"):
        quantize(source, tmp_path / "out", options, DataOptions(), small, Writing(dry_run=True))


def test_not_finite_embeddings_are_named(tiny, tmp_path: Path) -> None:
    source = tiny("mixtral")
    tensors = load_file(source / "model.safetensors")
    tensors[HEAD][3, 5] = float("nan")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    (damaged / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(Exception, match=r"'lm_head\.weight' has values that are NaN"):
        run(damaged, tmp_path / "out", None, embeddings="w4a16")
    assert not (tmp_path / "out").exists()


def test_a_stored_copy_of_a_tied_head_stays_one(tiny, rewrite, text: DataOptions, tmp_path: Path) -> None:
    """Stock ties what config.json ties and what is stored twice with equal values."""
    source = rewrite(tiny("qwen2_moe"), lambda found: found | {HEAD: found[EMBEDDINGS].clone()})
    assert run(source, tmp_path / "packed", text, scheme="w4a16", embeddings="w3a16").verified
    packed = open_model(tmp_path / "packed")
    both = packed.read([EMBEDDINGS, HEAD])
    assert torch.equal(both[EMBEDDINGS], both[HEAD])
    expand(tmp_path / "packed", tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_embeddings_beside_measured_widths(tiny, text: DataOptions, tmp_path: Path) -> None:
    report = run(tiny("mixtral"), tmp_path / "out", text, scheme="mixed", method="rtn", embeddings="w8a16")
    assert report.verified
    assert open_model(tmp_path / "out").packed[EMBEDDINGS].grid.bits == 8  # type: ignore[attr-defined, union-attr]
