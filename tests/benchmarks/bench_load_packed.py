"""Memory and speed of a model whose experts stay packed (`moetools.hf.load_packed`) beside the same model, plain.

    python tests/benchmarks/bench_load_packed.py --shape qwen3-30b-a3b --layers 2 --experts 32 --bits 1
    python tests/benchmarks/bench_load_packed.py --model MODEL --bits 1

The model is quantized without data (`--scheme sub1 --method rtn --experts-only`), and expanded again for the plain
rows. Memory is that of a process of its own for every row: resident behind loading, and behind a prompt and the steps.
Speeds are measured in one process, by turns, behind a first call that is not timed (numba compiles in it): tokens a
second of one prompt of `--tokens` and of as many greedy steps as `--steps`, medians of `--rounds`, with the median of
the rounds' ratios to the plain model. "Cache" is the share of the experts' bfloat16 bytes that may stay decoded; the
share of matrices that were there when needed is printed beside it, for the prompts and for the steps.
"""

import argparse
import itertools
import json
import statistics
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


def load(model: Path, row: str) -> Any:
    """The plain model, or the packed one with a cache of so many bytes."""
    if row == "plain":
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    return moetools.hf.load_packed(model, dtype=torch.bfloat16, cache_bytes=int(row))


def print_memory(options: argparse.Namespace) -> None:
    """In a process of its own: prints one line of JSON."""
    torch.set_num_threads(options.threads)
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    model = load(options.model, options.row)
    found: dict[str, Any] = {"load": time.perf_counter() - start, "loaded": process.memory_info().rss - before}
    measure(model, options.tokens, options.steps)
    print(json.dumps(found | {"end": process.memory_info().rss - before}))


@torch.no_grad()
def measure(model: Any, tokens: int, steps: int) -> dict[str, Any]:
    """Tokens a second of a prompt and of greedy steps behind it, and what the cache counted in each."""
    ids = torch.randint(2, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    counts, start = [_counts(model)], time.perf_counter()
    result = model(ids, use_cache=True)
    prompt = tokens / (time.perf_counter() - start)
    counts.append(_counts(model))
    start = time.perf_counter()
    for _ in range(steps):
        last = result.logits[:, -1:].argmax(-1)
        result = model(last, past_key_values=result.past_key_values, use_cache=True)
    step = steps / (time.perf_counter() - start)
    counts.append(_counts(model))
    hits = [(after[0] - before[0]) / max(1, sum(after) - sum(before)) for before, after in itertools.pairwise(counts)]
    return {"prompt": prompt, "step": step, "hits": hits}


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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--caches", type=float, nargs="+", default=[0, 0.25, 1.05])
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print_memory(options)
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
    rows = [("plain", plain, "plain")]
    rows += [(f"packed, cache {share:.0%}", packed, str(int(share * dense))) for share in options.caches]
    torch.set_num_threads(options.threads)
    models = [load(model, row) for _, model, row in rows]
    for model in models:
        measure(model, 4, 1)
    rounds = [[measure(model, options.tokens, options.steps) for model in models] for _ in range(options.rounds)]
    print("| experts | load, s | loaded, MB | at the end, MB | prompt, tokens/s | steps, tokens/s | found decoded, % |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for number, (label, model, row) in enumerate(rows):
        command = [sys.executable, __file__, "--row", row, "--model", str(model), "--tokens", str(options.tokens)]
        command += ["--steps", str(options.steps), "--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory = json.loads(done.stdout.splitlines()[-1])
        hits = " / ".join(f"{100 * share:.0f}" for share in rounds[-1][number]["hits"]) if number else ""
        speeds = [
            f"{statistics.median(one[number][what] for one in rounds):.1f} "
            f"({statistics.median(one[number][what] / one[0][what] for one in rounds):.2f})"
            for what in ("prompt", "step")
        ]
        sizes = " | ".join(f"{memory[what] / 1e6:.0f}" for what in ("loaded", "end"))
        print(f"| {label} | {memory['load']:.1f} | {sizes} | {' | '.join(speeds)} | {hits} |", flush=True)


if __name__ == "__main__":
    main()
