"""What every scheme and method of quantization costs and keeps.

`python tests/benchmarks/bench_quantize.py mixtral|embedded [--results FILE] [--curve] [--samples N]`

Per setting: bytes, true bits per routed-expert weight, KL(original || quantized), top-1 agreement and perplexity on
held-out text, and the seconds of the run beside those of a plain transformers forward pass over the same calibration
tokens. `--curve` measures combinations for the smallest sizes instead: embeddings and attention in few bits too, and
merged models, quantized on top. Rows are kept in the results file; what is there already is not measured again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_reduce import CPU, Bench, bench_of, plain_seconds, read_rows

from moetools.errors import MoetoolsError
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.quantize.verb import quantize
from moetools.verbs.reduce.options import MergeOptions
from moetools.verbs.reduce.verb import merge_experts

Setting = dict[str, Any]
EVALUATED_TOGETHER = 4
DATA_FREE = ("rtn", "hqq")
G64: Setting = {"group_size": 64}


def uniform_settings() -> list[Setting]:
    """Every scheme with every method that can fill it."""
    found: list[Setting] = [{"scheme": f"w{width}a16", "method": "gptq", **G64} for width in (4, 3, 2)]
    found += [{"scheme": "sub1", "method": "gptq", "bits": bits} for bits in (3.0, 2.0, 1.5, 1.0, 0.8, 0.6)]
    found += [{"scheme": "mixed", "method": "gptq", **G64, "bits": bits} for bits in (2.25, 2.5, 3.0)]
    found += [{"scheme": "ternary", "method": method, **G64} for method in ("gptq", "rtn")]
    for width in (4, 3, 2):
        found += [{"scheme": f"w{width}a16", "method": method, **G64} for method in ("rtn", "hqq", "awq")]
    found += [
        {"scheme": f"w{width}a16", "method": "gptq", **G64, "asymmetric": True, "target": "vllm"} for width in (3, 2)
    ]
    found += [{"scheme": f"w{width}a16", "method": "gptq", **G64, "experts_only": True} for width in (3, 2)]
    found += [
        {"scheme": scheme, "method": method, "target": target}
        for scheme, target in (("w8a8", "vllm"), ("fp8", "transformers"), ("mxfp4", "transformers"), ("nvfp4", "vllm"))
        for method in ("rtn", "gptq")
    ]
    found += [{"scheme": f"w{width}a16", "method": "gptq", **G64} for width in (8, 6, 5)]
    return found


def curve_settings() -> list[tuple[Setting, Setting]]:
    """(reduction, quantization): all that is stored in few bits, embeddings too, and fewer experts before that."""
    small: Setting = {"scheme": "sub1", "method": "gptq", "attention": "sub1:4", "embeddings": "sub1:4"}
    smaller: Setting = {"scheme": "sub1", "method": "gptq", "attention": "sub1:3", "embeddings": "sub1:3"}
    found: list[tuple[Setting, Setting]] = [
        ({}, {"scheme": "w4a16", "method": "gptq", **G64, "embeddings": "w8a16"}),
        ({}, {"scheme": "w4a16", "method": "gptq", **G64, "embeddings": "w4a16"}),
        ({}, {"scheme": "w3a16", "method": "gptq", **G64, "embeddings": "w3a16"}),
        ({}, {"scheme": "mixed", "method": "gptq", **G64, "bits": 2.5, "embeddings": "w4a16"}),
        ({}, {"scheme": "ternary", "method": "gptq", **G64, "embeddings": "w4a16"}),
    ]
    found += [({}, {**small, "bits": bits}) for bits in (4.0, 3.0, 2.5, 2.0, 1.5, 1.0, 0.8)]
    found += [({}, {**smaller, "bits": bits}) for bits in (2.0, 1.0, 0.6)]
    for target in (6, 4, 2):
        reduction: Setting = {"method": "joint", "to": target}
        found += [(reduction, {"scheme": "w4a16", "method": "gptq", **G64})]
        found += [(reduction, {**small, "bits": bits}) for bits in (3.0, 2.0, 1.0)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="mixtral", choices=("mixtral", "embedded"))
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--samples", type=int, default=None)
    asked = parser.parse_args()
    transformers.logging.disable_progress_bar()
    bench = bench_of(asked.model, asked.samples)
    rows = read_rows(asked.results)
    plain = plain_seconds(bench)
    print(f"plain forward over the calibration tokens: {plain:.2f} s; {torch.get_num_threads()} threads\n", flush=True)
    plan = curve_settings() if asked.curve else [({}, setting) for setting in uniform_settings()]
    keys = [[bench.name, asked.samples, reduction, setting] for reduction, setting in plan]
    todo = [key for key in keys if not any(row["key"] == key for row in rows)]
    for start in range(0, len(todo), EVALUATED_TOGETHER):
        for row in measure(bench, todo[start : start + EVALUATED_TOGETHER], plain):
            rows.append(row)
            print(markdown(row), flush=True)
            if asked.results is not None:
                with asked.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print("\n| setting | MB | bits/expert weight | KL | top-1 % | perplexity | s | x plain |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        if row["key"][0] == bench.name:
            print(markdown(row))


def measure(bench: Bench, keys: list[list[Any]], plain: float) -> list[dict[str, Any]]:
    """Quantize the model in several ways, then evaluate all results beside the original in one pass."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        outs = []
        for number, key in enumerate(keys):
            row: dict[str, Any] = {"key": key}
            rows.append(row)
            out = Path(folder) / str(number)
            try:
                row |= run(bench, key[2], key[3], out, plain)
                outs.append((out, row))
            except MoetoolsError as error:
                row["error"] = error.message
        if outs:
            found = evaluate([out for out, _ in outs], EvaluateOptions(reference=bench.model), bench.test, CPU).models[
                1:
            ]
            for (_, row), model in zip(outs, found, strict=True):
                assert model.metrics.agreement is not None
                row |= {
                    "kl": model.metrics.agreement.kl,
                    "top1": 100 * model.metrics.agreement.top1,
                    "perplexity": model.metrics.perplexity,
                }
    return rows


def run(bench: Bench, reduction: Setting, setting: Setting, out: Path, plain: float) -> dict[str, Any]:
    """Write `out`; bytes, bits, and seconds of the quantization's work without verification."""
    source = bench.model
    if reduction:
        source = out.with_name(f"{out.name}-reduced")
        merge_experts(bench.model, source, MergeOptions(**reduction), bench.calibration, CPU, Writing())
    data = DataOptions() if setting["method"] in DATA_FREE else bench.calibration
    start = time.perf_counter()
    report = quantize(source, out, QuantizeOptions(**setting), data, CPU, Writing(verify=False))
    seconds = time.perf_counter() - start
    return {
        "bytes": report.after["bytes"],
        "bits": report.after["expert_bits"],
        "seconds": seconds,
        "ratio": seconds / plain,
    }


def markdown(row: dict[str, Any]) -> str:
    _, _, reduction, setting = row["key"]
    parts = [f"{reduction['method']} to {reduction['target']}, then"] if reduction else []
    parts += [setting["scheme"], setting["method"]]
    parts += [f"{setting['bits']:g} bits"] if "bits" in setting else []
    parts += [name.replace("_", " ") for name in ("asymmetric", "experts_only") if setting.get(name)]
    parts += [f"{name} {setting[name]}" for name in ("attention", "embeddings") if name in setting]
    if "error" in row:
        return f"| {' '.join(parts)} | {row['error']} |"
    return (
        f"| {' '.join(parts)} | {row['bytes'] / 1e6:.2f} | {row['bits']:.3f} | {row['kl']:.4f} | {row['top1']:.1f} "
        f"| {row['perplexity']:.2f} | {row['seconds']:.1f} | {row['ratio']:.1f} |"
    )


if __name__ == "__main__":
    main()
