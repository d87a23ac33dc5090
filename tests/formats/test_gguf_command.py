"""GGUF files by the command: K-quants, widths of their own per tensor, and gpt-oss' published MXFP4."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("gguf")

from published import case
from test_gguf import with_tokenizer

import moetools.hf
from moetools.errors import UserError
from moetools.formats.gguf import read_gguf
from moetools.formats.reader import open_model
from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.quantize.report import QuantizationReport
from moetools.verbs.quantize.verb import quantize

CPU = ForwardOptions(device="cpu")
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_local_experts": 4}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": torch.randint(2, 120, (16, 16), generator=torch.Generator().manual_seed(3))}, file)
    return DataOptions(data=[f"random={file}"], seq_len=16, batch_size=8)


def run(model: Path, out: Path, data: DataOptions | None = None, **options: object) -> QuantizationReport:
    chosen = QuantizeOptions(**{"format": "gguf", "method": "gptq" if data else "rtn", **options})  # type: ignore[arg-type]
    return quantize(model, out, chosen, data or DataOptions(), CPU, Writing(), command="moetools test")


def kinds_of(out: Path) -> dict[str, str]:
    return {name: kind for name, kind, _ in read_gguf(out / "model.gguf")}


@pytest.mark.parametrize("scheme", ["q2_k", "q5_k"])
def test_kquants_by_name(scheme: str, tiny, tmp_path: Path, text: DataOptions) -> None:
    """The file, the checkpoint beside it, its expansion and the model that `moetools.hf` loads hold the same values."""
    model = with_tokenizer(tiny("mixtral", **WIDE), tmp_path / "model")
    report = run(model, tmp_path / "out", text, scheme=scheme, embeddings="q6_k")
    assert report.verified
    kinds = kinds_of(tmp_path / "out")
    assert kinds["blk.1.ffn_down_exps.weight"] == kinds["blk.0.attn_v.weight"] == scheme.upper()
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q6_K"
    quantize(tmp_path / "out", tmp_path / "plain", QuantizeOptions(expand=True), DataOptions(), CPU, Writing())
    plain = load_file(tmp_path / "plain/model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    found = {name: values for name, _, values in read_gguf(tmp_path / "out/model.gguf")}
    assert torch.equal(torch.tensor(found["blk.1.ffn_down_exps.weight"][2]).bfloat16(), plain[name])
    view = open_model(tmp_path / "out")
    assert torch.equal(view.read([name])[name], plain[name])
    assert report.after["expert_bits"] == pytest.approx({"q2_k": 2.625, "q5_k": 5.5}[scheme], rel=0.01)
    loaded = moetools.hf.quantizer.load_packed(tmp_path / "out", dtype=torch.float32)
    assert torch.isfinite(loaded(torch.arange(2, 20)[None]).logits).all()


def test_rows_that_kquants_do_not_take_get_integers(tiny, tmp_path: Path, text: DataOptions) -> None:
    model = with_tokenizer(tiny("mixtral", **{**WIDE, "intermediate_size": 96}), tmp_path / "model")
    report = run(model, tmp_path / "out", text, scheme="q3_k")
    kinds = kinds_of(tmp_path / "out")
    assert (kinds["blk.0.ffn_up_exps.weight"], kinds["blk.0.ffn_down_exps.weight"]) == ("Q3_K", "Q4_0")
    assert any("8 tensors have rows that 256 does not divide" in note for note in report.notes)
    small = with_tokenizer(tiny("mixtral", hidden_size=64, intermediate_size=96), tmp_path / "small")
    with pytest.raises(UserError, match="Q3_K has blocks of 256 columns"):
        run(small, tmp_path / "no", text, scheme="q3_k")


def test_gptq_on_the_kquants_own_scales_is_closer_than_rounding(tiny, tmp_path: Path, text: DataOptions) -> None:
    model = with_tokenizer(tiny("mixtral", **WIDE), tmp_path / "model")
    reports = {}
    for method in ("rtn", "gptq"):
        reports[method] = run(model, tmp_path / method, text, scheme="q3_k", method=method, format="moetools")
    lost = {method: sum(one.layers[1].groups["down"].output_error) for method, one in reports.items()}
    assert lost["gptq"] < 0.9 * lost["rtn"]


def test_mixed_widths_are_those_of_stacked_tensors(tiny, tmp_path: Path, text: DataOptions) -> None:
    model = with_tokenizer(tiny("mixtral", **WIDE), tmp_path / "model")
    report = run(model, tmp_path / "out", text, scheme="mixed", bits=3.5)
    bits = {name: kind for name, kind in kinds_of(tmp_path / "out").items() if "exps" in name}
    widths = {name: 8 if kind == "Q8_0" else int(kind[1]) for name, kind in bits.items()}
    assert set(widths.values()) <= {2, 3, 4, 5, 6, 8}
    assert all(kind.endswith("_K") or kind == "Q8_0" for kind in bits.values())
    assert 3.0 <= sum(widths.values()) / len(widths) <= 3.5
    for layer in range(2):
        assert bits[f"blk.{layer}.ffn_gate_exps.weight"] == bits[f"blk.{layer}.ffn_up_exps.weight"]
    assert report.verified


def test_mixed_widths_of_short_rows_are_four_five_and_eight(tiny, tmp_path: Path, text: DataOptions) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}
    model = with_tokenizer(tiny("mixtral", **small), tmp_path / "model")
    run(model, tmp_path / "out", text, scheme="mixed", bits=4.5)
    kinds = {kind for name, kind in kinds_of(tmp_path / "out").items() if "exps" in name}
    assert len(kinds) > 1
    assert kinds <= {"Q4_0", "Q5_0", "Q8_0"}
    for options, message in (
        ({"bits": 2.5}, "types of 4 bits and more"),
        ({"bits": 5.0, "asymmetric": True}, "symmetric"),
        ({"bits": 5.0, "group_size": 16}, "multiple of 32"),
    ):
        with pytest.raises(UserError, match=message):
            run(model, tmp_path / "no", text, scheme="mixed", **options)


def test_one_width_per_stacked_tensor_for_mlx(tiny, tmp_path: Path, text: DataOptions) -> None:
    small = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 3}
    run(tiny("qwen3_moe", **small), tmp_path / "out", text, scheme="mixed", bits=4.0, format="mlx")
    said = json.loads((tmp_path / "out/mlx/config.json").read_text())["quantization"]
    widths = {module: kind["bits"] for module, kind in said.items() if "switch_mlp" in module}
    assert len({*widths.values(), said["bits"]}) > 1
    view = open_model(tmp_path / "out")
    for layer in range(3):
        names = [name for name in view.packed if f"layers.{layer}." in name and ".down_proj" in name]
        assert len({view.packed[name].grid for name in names}) == 1


def test_published_mxfp4_keeps_its_values(tiny, tmp_path: Path) -> None:
    packed, plain = case("mxfp4", tiny, tmp_path)
    model = with_tokenizer(packed, tmp_path / "model")
    run(model, tmp_path / "out", scheme="mxfp4", experts_only=True)
    found = {name: (kind, torch.tensor(values)) for name, kind, values in read_gguf(tmp_path / "out/model.gguf")}
    dense = load_file(plain / "model.safetensors")
    for layer in range(2):
        fused = dense[f"model.layers.{layer}.mlp.experts.gate_up_proj"].float().mT
        down = dense[f"model.layers.{layer}.mlp.experts.down_proj"].float().mT
        for role, meant in (("gate", fused[:, ::2]), ("up", fused[:, 1::2]), ("down", down)):
            kind, values = found[f"blk.{layer}.ffn_{role}_exps.weight"]
            assert kind == "MXFP4"
            assert torch.equal(values, meant)
