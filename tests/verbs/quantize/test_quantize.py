"""quantize from a folder on disk to a verified folder on disk."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import moetools
from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import CheckpointError, UserError, VerificationError
from moetools.formats.reader import open_model
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.passes.quantize_pass import QuantizePass, quantize_plan
from moetools.pipeline import stock_verification
from moetools.pipeline.options import Writing
from moetools.pipeline.stock_verification import StockProcess, verify_in_transformers
from moetools.pipeline.verification import Intended
from moetools.text.options import DataOptions, load_tokens
from moetools.text.tokens import TokenBatch
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate
from moetools.verbs.quantize.options import MIXED_BITS, QuantizeOptions
from moetools.verbs.quantize.report import QuantizationReport
from moetools.verbs.quantize.verb import quantize
from tests.families import FAMILIES

CPU = ForwardOptions(device="cpu")

STOCK_CHECK = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
ids = torch.arange(2, 42)[None]
for packed, plain in zip(sys.argv[1::2], sys.argv[2::2]):
    logits = []
    for path in (packed, plain):
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, output_loading_info=True)
        bad = {key: str(value) for key, value in info.items() if value and key.endswith(("_keys", "_msgs"))}
        with torch.no_grad():
            logits.append(model.eval()(input_ids=ids, use_cache=False).logits)
    print(packed, "BAD" if bad or not torch.equal(*logits) else "good", bad, (logits[0] - logits[1]).abs().max())
assert "moetools" not in sys.modules
"""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (32, 16), generator=torch.Generator().manual_seed(3))}, file)
    return file


def data(tokens: Path) -> DataOptions:
    return DataOptions(data=[f"random={tokens}"], seq_len=16, batch_size=8)


def run(model: Path, out: Path, tokens: Path | None, *, dry_run: bool = False, **options: object) -> QuantizationReport:
    chosen = QuantizeOptions(**{"group_size": 8, "method": "gptq" if tokens else "rtn", **options})
    text = data(tokens) if tokens else DataOptions()
    return quantize(model, out, chosen, text, CPU, Writing(dry_run=dry_run), command="moetools test")


def expand(model: Path, out: Path) -> QuantizationReport:
    return quantize(model, out, QuantizeOptions(expand=True), DataOptions(), CPU, Writing(), command="moetools test")


def test_every_family_quantizes_and_loads_as_meant(tiny, tmp_path: Path) -> None:
    """Quantized with moetools' own verification; expanded; both loaded by stock transformers give the same logits."""
    pairs: list[str] = []
    for family in FAMILIES:
        packed, plain = tmp_path / f"{family}-packed", tmp_path / f"{family}-plain"
        whole = family in ("gpt_oss", "granitemoe")
        report = run(tiny(family), packed, None, format="moetools" if whole else "auto")
        assert report.verified
        assert report.after["quantized_bits"] < 8
        expand(packed, plain)
        if not whole:
            pairs += [str(packed), str(plain)]
    done = subprocess.run(
        [sys.executable, "-c", STOCK_CHECK, *pairs], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("good") == len(pairs) // 2, done.stdout


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_hessians_are_sums_over_the_tokens_that_were_routed(tiny, stock, tokens: Path, family: str) -> None:
    """Against stock transformers: hooks on its first layer, and one loop over tokens."""
    model = StreamedModel(open_checkpoint(tiny(family)), CPU)
    text = load_tokens(data(tokens), model.checkpoint, model.vocab_size)
    layers = QuantizePass(model, text, quantize_plan(model, text)).layers()
    layer = next(layers)
    paths = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"]
    attention = {tuple(group): inputs for group, inputs in layer.linear_inputs(paths, keep_experts=True)}
    wide = layer.wide_inputs(range(8))
    inner = layer.inner_inputs(range(8), layer.weights)

    reference = stock(tiny(family))
    seen: dict[str, torch.Tensor] = {}
    block = model.stock.moe_layers[0].block
    first = reference.model.layers[0]
    watched = {path: first.get_submodule(path) for path in ("self_attn.q_proj", "self_attn.o_proj", block)}
    handles = [
        module.register_forward_pre_hook(lambda _m, args, path=path: seen.__setitem__(path, args[0].flatten(0, -2)))
        for path, module in watched.items()
    ]
    experts = first.get_submodule(f"{block}.{model.arch.experts}")

    def note(_module, args, kwargs) -> None:
        given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
        seen["index"], seen["weight"] = given["top_k_index"], given["top_k_weights"]

    handles.append(experts.register_forward_pre_hook(note, with_kwargs=True))
    ids = torch.cat([batch.input_ids for batch in text.batches])
    with torch.no_grad():
        reference(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    for group, inputs in attention.items():
        x = seen["self_attn.o_proj" if "self_attn.o_proj" in group else "self_attn.q_proj"]
        torch.testing.assert_close(inputs.hessian_BII[0], x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert ("self_attn.q_proj", "self_attn.k_proj") in attention
    hidden = seen[block]
    weights = layer.weights
    for expert in range(8):
        token, place = (seen["index"] == expert).nonzero(as_tuple=True)
        g = seen["weight"][token, place, None]
        x = hidden[token]
        count = max(1, len(token))
        torch.testing.assert_close(wide.hessian_BII[expert], (g * x).T @ (g * x) / count, rtol=1e-4, atol=1e-6)
        assert wide.count_B[expert] == len(token)
        if family != "gpt_oss":
            gate, up = weights.gate_EFD[expert].float(), weights.up_EFD[expert].float()
            h = g * functional.silu(x @ gate.T) * (x @ up.T)
            torch.testing.assert_close(inner.hessian_BII[expert], h.T @ h / count, rtol=1e-4, atol=1e-7)


def kl(model: Path, reference: Path, tokens: Path) -> float:
    return evaluate([model], EvaluateOptions(reference=reference), data(tokens), CPU).models[1].metrics.agreement.kl


def test_gptq_is_closer_to_the_original_than_rounding(tiny, tmp_path: Path, tokens: Path) -> None:
    model = tiny("mixtral")
    reports = {
        method: run(model, tmp_path / method, tokens, scheme="w3a16", method=method) for method in ("rtn", "gptq")
    }
    lost = {method: sum(report.layers[2].groups["down"].output_error) for method, report in reports.items()}
    assert lost["gptq"] < 0.8 * lost["rtn"]


def test_mixed_widths_keep_the_average_and_serve_the_important(tiny, tmp_path: Path, tokens: Path) -> None:
    report = run(tiny("mixtral"), tmp_path / "out", tokens, scheme="mixed", bits=3.0)
    view = open_model(tmp_path / "out")
    widths = {
        name: packed for layer in report.layers.values() for name, packed in layer.bits.items() if "experts" in name
    }
    sizes = {name: view.tensors[name].shape[0] * view.tensors[name].shape[1] for name in widths}
    average = sum(widths[name] * sizes[name] for name in widths) / sum(sizes.values())
    assert 2.8 <= average <= 3.0
    assert set(widths.values()) <= set(MIXED_BITS)
    assert len(set(widths.values())) > 1


def test_expanded_is_what_the_packed_one_stands_for(tiny, tmp_path: Path) -> None:
    run(tiny("qwen3_moe"), tmp_path / "packed", None, scheme="w2a16")
    expand(tmp_path / "packed", tmp_path / "plain")
    view, plain = open_model(tmp_path / "packed"), load_file(tmp_path / "plain" / "model.safetensors")
    assert set(view.tensors) == set(plain)
    assert all(torch.equal(view.read([name])[name], plain[name]) for name in plain)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_experts_only_and_attention_leave_the_rest_byte_for_byte(tiny, tmp_path: Path) -> None:
    before = load_file(tiny("qwen2_moe") / "model.safetensors")
    run(tiny("qwen2_moe"), tmp_path / "experts", None, experts_only=True)
    after = load_file(tmp_path / "experts" / "model.safetensors")
    kept = [name for name in before if ".experts." not in name]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert not [name for name in after if "packed" in name and ".experts." not in name]
    run(tiny("qwen2_moe"), tmp_path / "none", None, attention="none")
    after = load_file(tmp_path / "none" / "model.safetensors")
    assert not [name for name in after if "packed" in name and "self_attn" in name]
    assert [name for name in after if "packed" in name and "shared_expert." in name]
    run(tiny("mixtral"), tmp_path / "two", None, scheme="w2a16", attention="w8a16")
    view = open_model(tmp_path / "two")
    assert view.packed["model.layers.0.self_attn.q_proj.weight"].grid.describe()["bits"] == 8


def test_dry_run_writes_nothing_and_tells_the_size(tiny, tmp_path: Path, tokens: Path) -> None:
    report = run(tiny("mixtral"), tmp_path / "out", tokens, dry_run=True)
    assert not (tmp_path / "out").exists()
    real = run(tiny("mixtral"), tmp_path / "out", tokens)
    assert report.after["bytes"] == pytest.approx(real.after["bytes"], rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w7a3"}, "unknown scheme"),
        ({"method": "gpqt"}, "did you mean 'gptq'"),
        ({"group_size": 7}, "group size 7 does not divide"),
        ({"group_size": -1}, "below 0"),
        ({"bits": 3.0}, "`bits` is for"),
        ({"scheme": "mixed", "bits": 1.0}, "takes 2 to 8"),
        ({"scheme": "mixed", "method": "rtn"}, "needs text"),
        ({"method": "gptq"}, "needs text"),
        ({"experts_only": True, "attention": "w8a16"}, "contradict"),
        ({"asymmetric": True, "scheme": "fp8"}, "no zero points"),
        ({"expand": True, "method": "gptq", "group_size": None}, "not quantized"),
        ({"expand": True, "method": "rtn"}, "writes plain weights"),
        ({"target": "llama"}, "unknown target"),
        ({"format": "onnx"}, "unknown format"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tiny, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        run(tiny("mixtral"), tmp_path / "out", None, **options)
    assert message in f"{error.value.message} {error.value.hint}"
    assert not (tmp_path / "out").exists()


def test_quantized_input_is_decoded_and_named(tiny, tmp_path: Path) -> None:
    run(tiny("mixtral"), tmp_path / "packed", None, scheme="w8a16")
    report = run(tmp_path / "packed", tmp_path / "again", None)
    assert report.notes[0].startswith("from pack-quantized (")
    assert report.after["quantized_bits"] < report.before["quantized_bits"]


def test_damaged_weights_are_named(tiny, tmp_path: Path, rewrite) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"][2, 3] = float("nan")
        return tensors

    with pytest.raises(CheckpointError, match=r"layers\.1\.block_sparse_moe\.experts\.3\.w2"):
        run(rewrite(tiny("mixtral"), damage), tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_experts_without_tokens_are_rounded_and_reported(tiny, tmp_path: Path) -> None:
    few = tmp_path / "few.safetensors"
    save_file({"input_ids": torch.full((2, 16), 5)}, few)
    report = run(tiny("mixtral"), tmp_path / "out", few)
    assert any(
        group.fallback or min(group.slots) == 0 for layer in report.layers.values() for group in layer.groups.values()
    )
    assert report.verified


def test_what_transformers_loads_otherwise_is_found(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In experts, attention or head; and a model that is too large to be loaded whole is said to be."""
    run(tiny("mixtral"), tmp_path / "good", None, scheme="w4a16")
    ids = torch.tensor([[5, 9, 3, 7]])
    batch = TokenBatch(input_ids=ids, attention_mask=None, task=torch.zeros(1, dtype=torch.long))
    intended = Intended(digests={}, batch=batch, logits=torch.zeros(1, 4, 128))
    assert verify_in_transformers(tmp_path / "good", CPU, intended) is None
    ask = StockProcess.ask
    for part in (r"experts\.down_proj$", r"o_proj\.weight$", r"lm_head\.weight$"):

        def other(self: StockProcess, request: dict, part: str = part) -> dict:
            answer = ask(self, request)
            digests = answer["digests"]
            name = next(name for name in digests if re.search(part, name))
            return {**answer, "digests": digests | {name: digests[name][::-1]}}

        monkeypatch.setattr(StockProcess, "ask", other)
        with pytest.raises(VerificationError, match=part.removesuffix("$")):
            verify_in_transformers(tmp_path / "good", CPU, intended)
    monkeypatch.setattr(stock_verification, "default_budget", lambda _: 1000)
    assert "not loaded whole" in (verify_in_transformers(tmp_path / "good", CPU, intended) or "")


def test_the_largest_rate_of_an_entropy_code_is_legal(tiny, tmp_path):
    report = moetools.quantize(tiny("mixtral"), tmp_path / "out", method="rtn", scheme="sub1", bits=6, dry_run=True)
    assert report.after["bytes"] < report.before["bytes"]
