"""Importance matrices hold what stock transformers' layers see, and llama-quantize takes them.

The latter needs MOETOOLS_LLAMA_QUANTIZE, the program llama-quantize, and MOETOOLS_LLAMA_PYTHON (see test_gguf).
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("gguf")

import gguf
from test_gguf import llama_scores, needs_llama, with_tokenizer

from moetools.errors import UserError
from moetools.formats.gguf import export_gguf
from moetools.formats.reader import open_model
from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions, load_tokens
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.quantize.verb import quantize

CPU = ForwardOptions(device="cpu", dtype="float32")
WIDTHS = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
FAMILIES = {"mixtral": {}, "granitemoe": {"embeddings": "w8a16"}}
"""With the options that store tensors of all experts."""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": torch.randint(2, 120, (4, 16), generator=torch.Generator().manual_seed(3))}, file)
    return file


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of unequal length and few different tokens: padding, and experts that see nothing."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abcab" * 3, "cab", "bbb", "cabcc" * 2)))
    return file


def run(model: Path, out: Path, file: Path | None, text: DataOptions, **options: object) -> None:
    chosen = {"scheme": "w8a16", "method": "rtn", "group_size": 32, "format": "gguf", "imatrix": file, **options}
    quantize(model, out, QuantizeOptions(**chosen), text, CPU, Writing(), command="moetools test")  # type: ignore[arg-type]


def read(file: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Fields and tensors, innermost dimension last."""
    reader = gguf.GGUFReader(str(file))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {one.name: one.data.reshape(tuple(reversed(one.shape.tolist()))) for one in reader.tensors}


class Seen:
    """Everything that stock linear layers and experts are given, token by token."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.mask = torch.zeros(0, dtype=torch.bool)
        for long_path, module in model.named_modules():
            path = long_path.replace("block_sparse_moe", "mlp")
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, args, path=path: self.add(path, args[0].flatten(0, -2)))
            if path.endswith(".experts"):
                module.register_forward_pre_hook(lambda experts, args, path=path: self.experts(path, experts, *args))

    def add(self, key: str, rows: torch.Tensor) -> None:
        self.rows.setdefault(key, []).extend(rows[self.mask].detach().double())

    def experts(self, path: str, experts: nn.Module, hidden: torch.Tensor, index: torch.Tensor, *_: object) -> None:
        for token in self.mask.nonzero()[:, 0].tolist():
            for expert in index[token].tolist():
                gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                self.rows.setdefault(f"{path}.{expert}.wide", []).append(hidden[token].detach().double())
                inner = nn.functional.silu(gate) * up
                self.rows.setdefault(f"{path}.{expert}.down", []).append(inner.detach().double())

    def squares(self, key: str, width: int = 32) -> tuple[torch.Tensor, int]:
        rows = self.rows.get(key, [])
        return sum((row**2 for row in rows), torch.zeros(width).double()), len(rows)


def means_of_experts(seen: Seen, block: str) -> Iterator[torch.Tensor]:
    """What llama-quantize weighs gate's and up's columns with: means, pulled towards the layer's for rare experts."""
    squares = [seen.squares(f"{block}.{expert}.wide") for expert in range(8)]
    everyone = sum(one for one, _ in squares) / sum(count for _, count in squares)
    for one, count in squares:
        own = one / max(1, count)
        scale = own.sum() / everyone.sum() if count else 1.0
        yield (count * own + 32 * everyone * scale) / (count + 32)


@pytest.mark.parametrize(("family", "text"), [("mixtral", "padded"), ("granitemoe", "tokens")])
def test_what_stock_layers_see(family: str, text: str, tiny, stock, tmp_path: Path, request) -> None:
    source = with_tokenizer(tiny(family, **WIDTHS), tmp_path / "model")
    data = DataOptions(data=[f"task={request.getfixturevalue(text)}"], seq_len=16, batch_size=2, pack=text == "tokens")
    run(source, tmp_path / "out", tmp_path / "seen.gguf", data, **FAMILIES[family])
    fields, found = read(tmp_path / "seen.gguf")
    model = stock(source)
    seen = Seen(model)
    for batch in (batches := load_tokens(data, open_model(source), 128)).batches:
        mask = torch.ones_like(batch.input_ids).bool() if batch.attention_mask is None else batch.attention_mask
        seen.mask = mask.flatten()
        model(input_ids=batch.input_ids, attention_mask=mask)
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == data.data
    assert fields["imatrix.chunk_size"] == 16
    assert fields["imatrix.chunk_count"] == max(1, batches.num_tokens // 16)
    empty = 0
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"
        for role in ("gate", "up"):
            name = f"blk.{layer}.ffn_{role}_exps.weight"
            counts = [seen.squares(f"{block}.{expert}.wide")[1] for expert in range(8)]
            assert found[f"{name}.counts"].tolist() == [[max(1, count)] for count in counts]
            means = found[f"{name}.in_sum2"] / found[f"{name}.counts"]
            np.testing.assert_allclose(means, torch.stack([*means_of_experts(seen, block)]), rtol=2e-4, atol=1e-6)
        name = f"blk.{layer}.ffn_down_exps.weight"
        for expert in range(8):
            squares, count = seen.squares(f"{block}.{expert}.down")
            empty += count == 0
            assert found[f"{name}.counts"][expert].tolist() == [count]
            np.testing.assert_allclose(found[f"{name}.in_sum2"][expert], squares, rtol=2e-4, atol=1e-6)
        for role, short in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "output")):
            squares, count = seen.squares(f"model.layers.{layer}.self_attn.{role}")
            name = f"blk.{layer}.attn_{short}.weight"
            assert found[f"{name}.counts"].tolist() == [[count]] == [[batches.num_tokens]]
            np.testing.assert_allclose(found[f"{name}.in_sum2"], squares[None], rtol=2e-4, atol=1e-6)
    assert len(found) == 2 * 2 * 7
    assert empty > 0 or text != "padded"


def test_what_is_refused(tiny, tokens: Path, tmp_path: Path) -> None:
    source = with_tokenizer(tiny("mixtral", **WIDTHS), tmp_path / "model")
    data, taken = DataOptions(data=[f"task={tokens}"]), tmp_path / "taken"
    taken.write_bytes(b"GGUF of weights")
    for file, text, options, message in (
        (tmp_path / "new", data, {"format": "moetools"}, "`imatrix` is for llama.cpp, `format=moetools` writes"),
        (tmp_path / "new", DataOptions(), {}, "`imatrix` measures what the weights see and needs text"),
        (taken, data, {}, "exists and is no importance matrix"),
        (tmp_path, data, {}, "is a directory"),
        (tmp_path / "none" / "new", data, {}, "does not exist"),
        (tmp_path / "out" / "new", data, {}, "does not exist"),
        (source / "config.json", data, {}, "exists and is no importance matrix"),
        (source / "new", data, {}, "lies inside model"),
    ):
        with pytest.raises(UserError, match=message):
            run(source, tmp_path / "out", file, text, **options)
    assert taken.read_bytes() == b"GGUF of weights"
    assert not (tmp_path / "out").exists()


QUANTIZE = os.environ.get("MOETOOLS_LLAMA_QUANTIZE", "")
WIDE = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}
LATENT = {
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 256,
    "v_head_dim": 64,
    "head_dim": 32,
}
RUNS = {
    "mixtral": {name: size for name, size in WIDE.items() if name != "moe_intermediate_size"},
    "qwen3_moe": WIDE,
    "deepseek_v3": {**WIDE, **LATENT},
}


@pytest.mark.skipif(not QUANTIZE, reason="no llama-quantize; set MOETOOLS_LLAMA_QUANTIZE")
@needs_llama
@pytest.mark.parametrize("family", RUNS)
def test_llama_quantize_takes_it(family: str, tiny, tokens: Path, tmp_path: Path) -> None:
    source = with_tokenizer(tiny(family, **RUNS[family]), tmp_path / "model")
    text = DataOptions(data=[f"task={tokens}"], seq_len=16, batch_size=4)
    run(source, tmp_path / "out", tmp_path / "seen.gguf", text, method="rtn")
    export_gguf(open_model(source), tmp_path / "plain.gguf")
    ids = list(range(2, 34))
    for kind, given in (("IQ2_XXS", "plain.gguf"), ("IQ3_XXS", "plain.gguf"), ("IQ2_XXS", "out/model.gguf")):
        command = [QUANTIZE, "--allow-requantize", "--imatrix", "seen.gguf", given, "small.gguf", kind]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        said = ran.stdout + ran.stderr
        assert ran.returncode == 0, said[-2000:]
        missing = [line for line in said.splitlines() if "did not find weights" in line and "for blk." in line]
        assert not missing
        assert "different from tensor size" not in said
        types = {one.name: one.tensor_type.name for one in gguf.GGUFReader(str(tmp_path / "small.gguf")).tensors}
        assert types["blk.1.ffn_up_exps.weight"] == kind
        assert torch.isfinite(llama_scores(tmp_path / "small.gguf", ids)).all()
