"""Our K-quants against llama-quantize's of the same model at the same size.

`MOETOOLS_LLAMA_QUANTIZE=... python tests/benchmarks/bench_gguf.py mixtral|embedded [--results FILE] [--types Q3_K Q2_K]
[--samples N] [--shared DIR]`

K-quants need rows of a multiple of 256 columns, which neither model has (192 and 384; 128): both are measured after
widening them with zeros, which computes the same function (checked here). Per type: ours (codes by GPTQ on calibration
text), ours rounded to nearest, llama-quantize's `--pure` file with our importance matrix of the same text, and
without. Every file is read by the gguf package and dequantized into a transformers checkpoint, which is compared with
the original on all test text: KL(original || file), top-1 agreement, perplexity. MB are those of the quantized tensors
without embeddings and head, which are BF16 in all files; `--embeddings` quantizes them, too.

`--engine` measures something else: KL(transformers || llama.cpp), both with the values of the same file, over 8 windows
of test text (MOETOOLS_LLAMA_PYTHON). llama.cpp rounds activations to 8 bits, transformers does not.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_reduce
import numpy as np
import torch
import transformers
from bench_reduce import Bench, bench_of, read_rows
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moetools.checkpoint.reader import Checkpoint, open_checkpoint
from moetools.formats.gguf import export_gguf, read_gguf
from moetools.formats.gguf_blocks import package
from moetools.formats.gguf_tensors import make_entries, row_order
from moetools.formats.reader import open_model
from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions, load_tokens
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.quantize.verb import quantize

BLOCK = 256
CPU = ForwardOptions(device="cpu", dtype="float32")
ENGINE: dict[str, dict[str, Any]] = {
    "Q8_0": {"scheme": "w8a16", "group_size": 32},
    "Q5_0": {"scheme": "w5a16", "group_size": 32},
    "Q4_0": {"scheme": "w4a16", "group_size": 32},
    "Q4_1": {"scheme": "w4a16", "group_size": 64, "asymmetric": True, "target": "vllm"},
    "Q5_1": {"scheme": "w5a16", "group_size": 64, "asymmetric": True, "target": "vllm"},
    "MXFP4": {"scheme": "mxfp4"},
    "TQ1_0": {"scheme": "ternary", "group_size": 256, "attention": "w4a16"},
    **{f"Q{bits}_K": {"scheme": f"q{bits}_k"} for bits in (2, 3, 4, 5, 6)},
}
_RUN = """
import sys, numpy as np
from llama_cpp import Llama
model = Llama(sys.argv[1], logits_all=True, n_ctx=256, verbose=False, n_threads=1, type_k=0, type_v=0)
found = []
for ids in np.load(sys.argv[2]).tolist():
    model.reset()
    model.eval(ids)
    found.append(np.array(model.scores[: len(ids)], dtype=np.float32))
np.save(sys.argv[3], np.stack(found))
"""
WAYS = ("ours gptq", "ours rtn", "llama-quantize, our imatrix", "llama-quantize")


def up(size: int) -> int:
    """The next multiple of a block."""
    return BLOCK * math.ceil(size / BLOCK)


def widened(source: Checkpoint, out: Path) -> Path:
    """The same function with hidden size, FFN widths and attention width of multiples of 256 (Mixtral, Qwen2-MoE).

    New columns and rows are zero. A norm divides by the mean over more numbers, which its weight and epsilon make up
    for: x / sqrt(m) = sqrt(h / H) x / sqrt(m h / H). Every key-value head gets as many more query heads as needed.
    """
    config, hidden = dict(source.config), source.config["hidden_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    new_heads, wide = up(heads * size) // size, up(hidden)
    factor = math.sqrt(hidden / wide)
    out.mkdir()
    tensors = {}
    for name, value in source.read(list(source.tensors)).items():
        leaf = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if "norm" in leaf:
            tensors[name] = padded(value.float() * factor, (wide,))
            continue
        if leaf in ("q_proj", "o_proj"):
            value = spread_heads(value, leaf, (groups, heads // groups, new_heads // groups, size))
        columns = hidden if value.ndim == 2 and leaf not in ("o_proj", "down_proj", "w2") else 0
        shape = [
            up(length) if leaf not in ("gate", "k_proj", "v_proj", "shared_expert_gate") else length
            for length in value.shape
        ]
        if columns:
            shape[-1] = wide
        tensors[name] = padded(value, tuple(shape)).contiguous()
    for key in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if config.get(key):
            config[key] = up(config[key])
    eps = config["rms_norm_eps"] * hidden / wide
    config |= {"hidden_size": wide, "num_attention_heads": new_heads, "head_dim": size, "rms_norm_eps": eps}
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in source.path.glob("tokenizer*"):
        shutil.copy(file, out)
    return out


def padded(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros behind the end of every dimension."""
    result = value.new_zeros(shape)
    result[tuple(slice(0, length) for length in value.shape)] = value
    return result


def spread_heads(value: Tensor, leaf: str, sizes: tuple[int, int, int, int]) -> Tensor:
    """Query heads of each key-value head followed by zero heads."""
    groups, old, new, size = sizes
    heads = value.T if leaf == "o_proj" else value
    shape = heads.shape[1:]
    wide = heads.new_zeros(groups, new, size, *shape)
    wide[:, :old] = heads.reshape(groups, old, size, *shape)
    wide = wide.reshape(groups * new * size, *shape)
    return wide.T if leaf == "o_proj" else wide


def logits(model: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits


def dequantized(wide: Path, file: Path, out: Path) -> Path:
    """A transformers checkpoint in fp32 of the values in a GGUF file, as the gguf package has them."""
    source = open_checkpoint(wide)
    entries = {entry.name: entry for entry in make_entries(source, "TQ1_0")}
    tensors = {}
    for name, _, values in read_gguf(file):
        entry = entries[name]
        value = torch.from_numpy(values.copy())
        parts = value.unbind(0) if len(entry.parts) > 1 else [value]
        for part, one in zip(entry.parts, parts, strict=True):
            stored = source.tensors[part].shape
            order = row_order(entry, stored[0])
            tensors[part] = torch.empty_like(one.reshape(stored)).index_copy_(0, order, one.reshape(stored))
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((wide / "config.json").read_text()) | {"dtype": "float32", "torch_dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config))
    for tokenizer in wide.glob("tokenizer*"):
        shutil.copy(tokenizer, out)
    return out


def engine_kl(wide: Path, file: Path, folder: Path, ids: Tensor) -> float:
    """KL(transformers || llama.cpp) of the values in a file, in nats per token."""
    np.save(folder / "ids.npy", ids.numpy())
    command = [os.environ["MOETOOLS_LLAMA_PYTHON"], "-c", _RUN, file, folder / "ids.npy", folder / "found.npy"]
    subprocess.run(command, check=True, capture_output=True)
    found = torch.from_numpy(np.load(folder / "found.npy")).log_softmax(-1)
    expected = logits(dequantized(wide, file, folder / f"{file.parent.name}-dense"), ids).log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def compare_engines(bench: Bench, wide: Path, folder: Path) -> None:
    data = load_tokens(
        replace(bench.test, samples=2), open_model(wide), json.loads((wide / "config.json").read_text())["vocab_size"]
    )
    ids = torch.cat([batch.input_ids for batch in data.batches])[:8]
    print("| type | KL(transformers || llama.cpp) |\n|---|---|")
    for kind, setting in ENGINE.items():
        options = QuantizeOptions(method="rtn", format="gguf", **setting)
        quantize(wide, folder / kind, options, DataOptions(), CPU, Writing(verify=False), command="bench_gguf")
        print(f"| {kind} | {engine_kl(wide, folder / kind / 'model.gguf', folder, ids):.6f} |", flush=True)


def megabytes(file: Path, kind: str) -> float:
    tensors = package().GGUFReader(str(file)).tensors
    return sum(one.n_bytes for one in tensors if one.tensor_type.name == kind) / 1e6


def ours(wide: Path, out: Path, kind: str, method: str, data: DataOptions, *, embeddings: bool) -> Path:
    more = {"embeddings": kind.lower()} if embeddings else {}
    options = QuantizeOptions(scheme=kind.lower(), method=method, format="gguf", **more)  # type: ignore[arg-type]
    quantize(wide, out, options, data if method == "gptq" else DataOptions(), CPU, Writing(), command="bench_gguf")
    return out / "model.gguf"


def theirs(plain: Path, out: Path, kind: str, imatrix: Path | None, *, embeddings: bool) -> Path:
    command = [os.environ["MOETOOLS_LLAMA_QUANTIZE"], "--pure"]
    if not embeddings:
        command += ["--token-embedding-type", "bf16", "--output-tensor-type", "bf16"]
    command += ["--imatrix", str(imatrix)] if imatrix else []
    ran = subprocess.run([*command, str(plain), str(out), kind], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stdout[-2000:] + ran.stderr[-2000:])
    return out


def importance(wide: Path, folder: Path, data: DataOptions) -> Path:
    file = folder / "seen.gguf"
    options = QuantizeOptions(scheme="w8a16", method="rtn", format="gguf", group_size=32, imatrix=file)
    quantize(wide, folder / "unused", options, data, CPU, Writing(verify=False), command="bench_gguf")
    return file


def measure(bench: Bench, kind: str, folder: Path, *, embeddings: bool) -> list[dict[str, Any]]:
    """All ways of one type, evaluated in one pass."""
    wide, plain, seen = folder / "wide", folder / "plain.gguf", folder / "seen.gguf"
    files = {
        WAYS[0]: ours(wide, folder / f"{kind}-gptq", kind, "gptq", bench.calibration, embeddings=embeddings),
        WAYS[1]: ours(wide, folder / f"{kind}-rtn", kind, "rtn", bench.calibration, embeddings=embeddings),
        WAYS[2]: theirs(plain, folder / f"{kind}-imatrix.gguf", kind, seen, embeddings=embeddings),
        WAYS[3]: theirs(plain, folder / f"{kind}-plain.gguf", kind, None, embeddings=embeddings),
    }
    outs = [dequantized(wide, file, folder / f"{kind}-{place}") for place, file in enumerate(files.values())]
    found = evaluate(outs, EvaluateOptions(reference=wide), bench.test, CPU).models[1:]
    rows = []
    for (way, file), model in zip(files.items(), found, strict=True):
        agreement = model.metrics.agreement
        assert agreement is not None
        row = {"key": [bench.name, kind, way, embeddings], "mb": megabytes(file, kind), "kl": agreement.kl}
        rows.append(row | {"top1": 100 * agreement.top1, "perplexity": model.metrics.perplexity})
    return rows


def markdown(row: dict[str, Any]) -> str:
    name, kind, way, _ = row["key"]
    shown = f"{row['mb']:.2f} | {row['kl']:.5f} | {row['top1']:.1f} | {row['perplexity']:.2f}"
    return f"| {name} | {kind} | {way} | {shown} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="mixtral", choices=("mixtral", "embedded"))
    parser.add_argument("--types", nargs="+", default=["Q3_K", "Q2_K"])
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--shared", type=Path, default=bench_reduce.SHARED)
    parser.add_argument("--embeddings", action="store_true")
    parser.add_argument("--engine", action="store_true")
    asked = parser.parse_args()
    transformers.logging.disable_progress_bar()
    bench_reduce.SHARED = asked.shared
    bench, rows = bench_of(asked.model, asked.samples), read_rows(asked.results)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wide = widened(open_checkpoint(bench.model), folder / "wide")
        ids = torch.randint(2, 1000, (2, 64), generator=torch.Generator().manual_seed(0))
        off = (logits(wide, ids) - logits(bench.model, ids)).abs().max().item()
        print(f"logits of the widened model: within {off:.1e}", flush=True)
        if asked.engine:
            compare_engines(bench, wide, folder)
            return
        export_gguf(open_model(wide), folder / "plain.gguf")
        importance(wide, folder, bench.calibration)
        for kind in asked.types:
            for row in measure(bench, kind, folder, embeddings=asked.embeddings):
                print(markdown(row), flush=True)
                rows.append(row)
                if asked.results is not None:
                    with asked.results.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
