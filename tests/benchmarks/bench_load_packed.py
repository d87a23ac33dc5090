"""Memory and speed of a model whose experts stay packed (`moetools.hf.load_packed`) beside the same model, plain.

    python tests/benchmarks/bench_load_packed.py --shape qwen3-30b-a3b --layers 2 --experts 32 --bits 1
    python tests/benchmarks/bench_load_packed.py --model MODEL --bits 1

The model is quantized without data (`--scheme sub1 --method rtn --experts-only`), and expanded again for the plain
rows. Every row is a process of its own: resident memory behind loading and behind the last step, tokens a second of
one prompt of `--tokens` and of as many greedy steps as `--steps`, both behind a first call that is not timed (numba
compiles in it).
"Cache" is the share of the experts' bfloat16 bytes that may stay decoded; the share of matrices that were there when
needed is printed beside it, for the prompt and for the steps.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import psutil
import torch
from safetensors.torch import save_file
from synthetic import SHAPES, Maker, write_tokenizer
from transformers import AutoModelForCausalLM

import moetools
import moetools.hf

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def write_model(out: Path, shape: str, layers: int, experts: int, vocabulary: int) -> None:
    """A synthetic checkpoint of real width with fewer layers, experts and tokens."""
    config = {**SHAPES[shape], "num_hidden_layers": layers, "vocab_size": vocabulary, "dtype": "bfloat16"}
    config |= {name: experts for name in COUNTS if name in config}
    make = Maker(config, torch.Generator().manual_seed(0))
    found = make.rest()
    for layer in range(layers):
        found |= make.layer(layer)
    out.mkdir(parents=True)
    save_file(found, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    write_tokenizer(out, vocabulary)


def run_row(options: argparse.Namespace) -> None:
    """In a process of its own: prints one line of JSON."""
    torch.set_num_threads(options.threads)
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    if options.row == "plain":
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    else:
        model = moetools.hf.load_packed(options.model, dtype=torch.bfloat16, cache_bytes=int(options.row))
    found: dict[str, Any] = {"load": time.perf_counter() - start, "loaded": process.memory_info().rss - before}
    ids = torch.randint(2, model.config.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids[:, :2])
        counts = [_counts(model)]
        start = time.perf_counter()
        result = model(ids, use_cache=True)
        found["prefill"] = options.tokens / (time.perf_counter() - start)
        counts.append(_counts(model))
        start = time.perf_counter()
        for _ in range(options.steps):
            last = result.logits[:, -1:].argmax(-1)
            result = model(last, past_key_values=result.past_key_values, use_cache=True)
        found["decode"] = options.steps / (time.perf_counter() - start)
    counts.append(_counts(model))
    found["hits"] = [
        (after[0] - before[0]) / max(1, sum(after) - sum(before)) for before, after in itertools.pairwise(counts)
    ]
    found["last"], found["peak"] = int(last), process.memory_info().rss - before
    print(json.dumps(found))


def _counts(model: Any) -> tuple[int, int]:
    cache = getattr(model, "moetools_cache", None)
    return (0, 0) if cache is None else (cache.hits, cache.misses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--caches", type=float, nargs="+", default=[0, 0.25, 1.05])
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        run_row(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.model is None:
            options.model = scratch / "model"
            sizes = (options.layers, options.experts, options.vocabulary)
            write_model(options.model, options.shape, *sizes)
        compare(options, scratch)


def compare(options: argparse.Namespace, scratch: Path) -> None:
    """The table."""
    packed, plain = scratch / "packed", scratch / "plain"
    common: dict[str, Any] = {"device": "cpu", "verify": False}
    moetools.quantize(str(options.model), str(packed), scheme="sub1", bits=options.bits, method="rtn",
                      experts_only=True, **common)  # fmt: skip
    moetools.quantize(str(packed), str(plain), expand=True, **common)
    from moetools.formats.reader import open_model

    view: Any = open_model(packed)
    dense = sum(view.tensors[name].nbytes for name in view.packed)
    coded = sum(view.stored_bytes(name) for name in view.packed)
    print(f"experts: {dense / 1e6:.0f} MB in bfloat16, {coded / 1e6:.0f} MB coded ({16 * coded / dense:.3f} bits)\n")
    print("| experts | load, s | loaded, MB | at the end, MB | prompt, tokens/s | steps, tokens/s | found decoded, % |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows = [("plain", plain, "plain")]
    rows += [(f"packed, cache {share:.0%}", packed, str(int(share * dense))) for share in options.caches]
    first: dict[str, Any] = {}
    for label, model, row in rows:
        command = [sys.executable, __file__, "--row", row, "--model", str(model), "--tokens", str(options.tokens)]
        command += ["--steps", str(options.steps), "--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        one = json.loads(done.stdout.splitlines()[-1])
        first = first or one
        hits = " / ".join(f"{100 * share:.0f}" for share in one["hits"]) if row != "plain" else ""
        print(f"| {label} | {one['load']:.1f} | {one['loaded'] / 1e6:.0f} | {one['peak'] / 1e6:.0f} "
              f"| {one['prefill']:.1f} ({one['prefill'] / first['prefill']:.2f}) "
              f"| {one['decode']:.2f} ({one['decode'] / first['decode']:.2f}) | {hits} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
