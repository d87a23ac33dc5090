"""quantize with a reference: what experts are solved for is what the reference has and the quantized stream lacks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moetools
from moetools.errors import UserError
from moetools.passes import quantize_pass

HOW = {"method": "gptq", "group_size": 8, "seq_len": 16, "device": "cpu", "verify": False}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (56, 16), generator=torch.Generator().manual_seed(3))}, file)
    return f"random={file}"


def seen(path: Path, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By MoE layer, of stock transformers: hidden states behind it, and what its routed experts add."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    layers = [layer for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    behind, routed = [], []
    for layer in layers:
        layer.register_forward_hook(lambda _m, _a, out: behind.append(out[0] if isinstance(out, tuple) else out))
        layer.mlp.experts.register_forward_hook(lambda _m, _a, out: routed.append(out))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return [(one, other.view(one.shape)) for one, other in zip(behind, routed, strict=True)]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_what_is_wanted_is_what_the_quantized_stream_lacks(family, tiny, text, tmp_path, monkeypatch):
    model, wanted, solve = tiny(family), [], quantize_pass.refit_down

    def watched(streams, *more):
        wanted.append(streams.wanted(0))
        return solve(streams, *more)

    monkeypatch.setattr(quantize_pass, "refit_down", watched)
    shared = {**HOW, "data": text, "dtype": "float32", "scheme": "w3a16", "format": "moetools"}
    moetools.quantize(model, tmp_path / "packed", reference=model, batch_size=56, **shared)
    moetools.quantize(tmp_path / "packed", tmp_path / "plain", expand=True, verify=False)
    ids = load_file(text.partition("=")[2])["input_ids"]
    pairs = list(zip(seen(tmp_path / "plain", ids), seen(model, ids), strict=True))
    assert len(wanted) == len(pairs) > 1
    for found, ((quantized, added), (original, _)) in zip(wanted, pairs, strict=True):
        lacks = (original - (quantized - added)).flatten(0, 1)
        torch.testing.assert_close(found, lacks, rtol=2e-2, atol=1e-2 * lacks.abs().max().item())


@pytest.mark.parametrize("scheme", ["w2a16", "sub1"])
def test_it_is_closer_to_the_reference(scheme, tiny, text, tmp_path):
    model = tiny("mixtral")
    moetools.prune_experts(model, tmp_path / "pruned", keep=5, method="reap", data=text, seq_len=16, verify=False)
    lost = {}
    for name, reference in (("without", None), ("with", model)):
        # Tables and headers of so small matrices alone take more than a bit per weight.
        asked = {"scheme": scheme, **({"bits": 2.5} if scheme == "sub1" else {}), **HOW}
        moetools.quantize(tmp_path / "pruned", tmp_path / name, reference=reference, data=text, **asked)
        found = moetools.evaluate(tmp_path / name, reference=model, data=text, seq_len=16, device="cpu").to_json()
        lost[name] = found["models"][1]["agreement"]["kl"]
    assert lost["with"] < 0.9 * lost["without"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": []}, "`reference` solves on text|needs text"),
        ({"method": "rtn"}, "`reference` solves on text"),
        ({"samples": 5}, "too few"),
        ({"reference": "other"}, "has hidden_size 64"),
    ],
)
def test_what_is_refused(options, message, tiny, text, tmp_path):
    model = tiny("mixtral")
    if "reference" in options:
        options = {"reference": tiny("mixtral", hidden_size=64)}
    with pytest.raises(UserError, match=message):
        moetools.quantize(model, tmp_path / "out", **{"reference": model, **HOW, "data": text, **options})
    assert not (tmp_path / "out").exists()
