"""What every way to drop or merge experts costs and keeps.

`python tests/benchmarks/bench_reduce.py mixtral|embedded [--results FILE] [--quick] [--samples N] [--targets N N]`

Measures every preset as it is, with fitted router rows, with a joint refit and with both, at several numbers of
experts: bytes, KL(original || result), top-1 agreement and perplexity on held-out text, and the seconds of the
reduction beside those of a plain transformers forward pass over the same calibration tokens. Rows are appended to the
results file as they are measured, and a row that is there already is not measured again, so an interrupted run goes on
where it stopped. At the end, all rows of the file are printed as a Markdown table. `--quick` measures a few strong
settings and their baselines only; `--samples` takes that many windows per task instead of all.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from moetools.checkpoint.reader import open_checkpoint
from moetools.demo import demo_data_path, demo_model_path
from moetools.errors import MoetoolsError
from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions, load_tokens
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate
from moetools.verbs.reduce.options import MergeOptions, PruneOptions
from moetools.verbs.reduce.verb import merge_experts, prune_experts

SHARED = Path(__file__).resolve().parents[3] / "shared"
CPU = ForwardOptions(device="cpu")
EVALUATED_TOGETHER = 8
Setting = tuple[str, str, dict[str, Any]]

JOINT: dict[str, Any] = {"refit": "joint", "sequential": True}
FITTED: dict[str, Any] = {"router": "fitted"}
PRUNING = ("reap", "frequency", "gate-mass", "ean", "easy-ep", "naee", "random")
AVERAGING = ("average", "frequency-average", "saliency-average", "hc-smoe", "m-smoe", "sub-moe", "mergemoe", "ream")
QUICK: list[Setting] = [
    ("prune", "reap", {}),
    ("prune", "reap", JOINT),
    ("prune", "auto", {}),
    ("merge", "ream", {}),
    ("merge", "joint", {}),
    ("merge", "auto", {}),
]
HEALED: list[Setting] = [
    ("merge", "joint", {"heal": 480}),
    ("prune", "reap", {"heal": 480}),
    ("prune", "reap", {"heal": 480, "heal_train": "router"}),
]


def every_setting() -> list[Setting]:
    """The presets with and without fitted router rows and joint refit; the strongest first."""
    found = list(QUICK)
    for more in ({}, JOINT):
        found += [("prune", method, more) for method in PRUNING]
    for more in ({}, FITTED, JOINT, JOINT | FITTED):
        found += [("merge", method, more) for method in AVERAGING]
    found += [("merge", "joint", {"router": "centroid"}), ("merge", "joint", {"combine": "average"})]
    return [setting for place, setting in enumerate(found) if setting not in found[:place]]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model, its text and the numbers of experts to reach."""

    name: str
    model: Path
    calibration: DataOptions
    healing: DataOptions
    test: DataOptions
    targets: tuple[int, ...]


def bench_of(name: str, samples: int | None) -> Bench:
    if name == "mixtral":
        data, tasks = SHARED / "data", ("code", "math", "plays", "reviews", "german")
        model, targets = SHARED / "models" / "mixtral-8x9m", (6, 4, 2)
        calibration = [f"cal={data}/calibration.safetensors"]
        more = [f"{task}={data}/{task}/train.jsonl" for task in tasks]
    else:
        data, tasks = demo_data_path(), ("arithmetic", "code", "french", "prose")
        calibration = [f"{task}={data}/{task}/calibration.jsonl" for task in tasks]
        model, targets, more = demo_model_path(), (12, 8, 4), calibration
    test = [f"{task}={data}/{task}/test.jsonl" for task in tasks]
    return Bench(
        name=name,
        model=model,
        calibration=DataOptions(data=calibration, seq_len=256, samples="all"),
        healing=DataOptions(data=more, seq_len=256),
        test=DataOptions(data=test, seq_len=256, samples=samples),
        targets=targets,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="mixtral", choices=("mixtral", "embedded"))
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--targets", type=int, nargs="+", default=None)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    transformers.logging.disable_progress_bar()
    bench = bench_of(asked.model, asked.samples)
    rows = read_rows(asked.results)
    plain = plain_seconds(bench)
    print(f"plain forward over the calibration tokens: {plain:.2f} s\n", flush=True)
    for target in asked.targets or bench.targets:
        plan = QUICK if asked.quick else every_setting()
        if target == bench.targets[1]:
            plan = plan + HEALED
        done = [row["key"] for row in rows]
        todo = [setting for setting in plan if key_of(bench, target, setting) not in done]
        for start in range(0, len(todo), EVALUATED_TOGETHER):
            for row in measure(bench, target, todo[start : start + EVALUATED_TOGETHER], plain):
                rows.append(row)
                print(markdown(row), flush=True)
                if asked.results is not None:
                    with asked.results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print_table([row for row in rows if row["key"][0] == bench.name])


def key_of(bench: Bench, target: int, setting: Setting) -> list[Any]:
    """What makes a row: comparable with what JSON gives back."""
    verb, method, settings = setting
    return [bench.name, bench.test.samples, target, verb, method, settings]


def read_rows(file: Path | None) -> list[dict[str, Any]]:
    """Rows measured before; a last line that an interrupted run left half-written is dropped."""
    if file is None or not file.exists():
        return []
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"left out: {line[:60]}")
    return rows


def plain_seconds(bench: Bench) -> float:
    """The best of three stock forward passes over the calibration tokens."""
    stock = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).eval()
    data = load_tokens(bench.calibration, open_checkpoint(bench.model), stock.config.vocab_size)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in data.batches:
                stock(input_ids=batch.input_ids, use_cache=False)
        best = min(best, time.perf_counter() - start)
    return best


def measure(bench: Bench, target: int, settings: list[Setting], plain: float) -> list[dict[str, Any]]:
    """Reduce the model in several ways, then evaluate all results beside the original in one pass."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        outs = []
        for number, setting in enumerate(settings):
            row = {"key": key_of(bench, target, setting), "plain": round(plain, 3)}
            rows.append(row)
            try:
                row["seconds"] = round(reduce(bench, Path(folder) / str(number), setting, target), 2)
                outs.append((Path(folder) / str(number), row))
            except MoetoolsError as error:
                row["error"] = error.message
        if outs:
            judged = evaluate([out for out, _ in outs], EvaluateOptions(reference=bench.model), bench.test, CPU)
            found = judged.to_json()["models"][1:]
            for (_, row), measured in zip(outs, found, strict=True):
                row |= {
                    "nbytes": measured["nbytes"],
                    "kl": measured["agreement"]["kl"],
                    "top1": measured["agreement"]["top1"],
                    "perplexity": measured["perplexity"],
                }
    return rows


def reduce(bench: Bench, out: Path, setting: Setting, target: int) -> float:
    """Write `out`; seconds of the whole command's work, verification included."""
    verb, method, settings = setting
    more = {"method": method, **settings, **({"heal_data": bench.healing.data} if "heal" in settings else {})}
    given = (bench.calibration, CPU, Writing())
    start = time.perf_counter()
    if verb == "prune":
        prune_experts(bench.model, out, PruneOptions(keep=target, **more), *given)
    else:
        merge_experts(bench.model, out, MergeOptions(to=target, **more), *given)
    return time.perf_counter() - start


def print_table(rows: list[dict[str, Any]]) -> None:
    """All rows, those with most experts first, the best KL of each number of experts first."""
    print("\n| experts | setting | MB | KL | top-1 % | perplexity | seconds | times a plain pass |\n|" + "---|" * 8)
    for row in sorted(rows, key=lambda row: (-row["key"][2], row.get("kl", float("inf")))):
        print(markdown(row))


def markdown(row: dict[str, Any]) -> str:
    _, _, target, verb, method, settings = row["key"]
    flags = " ".join(f"--{key} {value}" if value is not True else f"--{key}" for key, value in settings.items())
    name = f"{verb} {method} {flags}".strip()
    if "error" in row:
        return f"| {target} | {name} | {row['error']} | | | | | |"
    quality = f"{row['kl']:.4f} | {100 * row['top1']:.1f} | {row['perplexity']:.2f}"
    cost = f"{row['seconds']:.1f} | {row['seconds'] / row['plain']:.1f}"
    return f"| {target} | {name} | {row['nbytes'] / 1e6:.2f} | {quality} | {cost} |"


if __name__ == "__main__":
    main()
