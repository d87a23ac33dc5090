"""Half the experts of a real language model: what every strong setting keeps, and what it costs.

`python tests/benchmarks/bench_real.py MODEL DATA [--keep N] [--windows N] [--judged N] [--only NAME ...]`

DATA holds one folder per text with `train.jsonl` (calibration) and `test.jsonl` (judging). Every setting runs as a
command of its own, so CPU seconds (user and system) and peak memory are those of that process; then all results are
judged beside the original in one pass: KL(original || result) and perplexity by text. Prints a Markdown table.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetools.forward.options import ForwardOptions
from moetools.text.options import DataOptions
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate

SETTINGS: dict[str, tuple[str, ...]] = {
    "prune reap": ("prune-experts", "--method", "reap", "--keep"),
    "prune reap --refit joint": ("prune-experts", "--method", "reap", "--refit", "joint", "--sequential", "--keep"),
    "prune auto": ("prune-experts", "--method", "auto", "--keep"),
    "merge joint": ("merge-experts", "--method", "joint", "--to"),
    "merge joint --router centroid": ("merge-experts", "--method", "joint", "--router", "centroid", "--to"),
    "merge auto": ("merge-experts", "--method", "auto", "--to"),
}
LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one process: user and system seconds, and the largest resident set in MiB."""

    seconds: float
    peak: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--texts", nargs="+", default=["reviews", "plays", "code", "math"])
    parser.add_argument("--keep", type=int, default=8)
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 256 tokens per text")
    parser.add_argument("--judged", type=int, default=4, help="test windows of 256 tokens per text")
    parser.add_argument("--only", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outs = {name: Path(folder) / str(number) for number, name in enumerate(asked.only)}
        costs = {name: reduced(asked, name, out) for name, out in outs.items()}
        data = DataOptions(data=_named(asked, "test"), seq_len=LENGTH, samples=asked.judged)
        options = EvaluateOptions(reference=asked.model)
        judged = evaluate(list(outs.values()), options, data, ForwardOptions(device="cpu")).to_json()["models"]
    print("| setting | KL | perplexity | perplexity by text | CPU seconds | peak MiB |\n|---|---|---|---|---|---|")
    print(_row("original", judged[0], None))
    for (name, cost), model in zip(costs.items(), judged[1:], strict=True):
        print(_row(name, model, cost))


def reduced(asked: argparse.Namespace, name: str, out: Path) -> Cost:
    """Write one result in a process of its own."""
    verb, *more = SETTINGS[name]
    texts = [word for text in _named(asked, "train") for word in ("--data", text)]
    counts = ["--seq-len", str(LENGTH), "--samples", str(asked.windows), "--no-verify"]
    command = [sys.executable, "-m", "moetools", verb, str(asked.model), str(out), *texts, *counts, *more]
    with subprocess.Popen([*command, str(asked.keep)], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name}: exit status {process.returncode}")
    cost = Cost(seconds=usage.ru_utime + usage.ru_stime, peak=usage.ru_maxrss / 1024)
    print(f"{name}: {cost.seconds:.0f} CPU seconds, {cost.peak:.0f} MiB", file=sys.stderr, flush=True)
    return cost


def _named(asked: argparse.Namespace, part: str) -> list[str]:
    return [f"{text}={asked.data}/{text}/{part}.jsonl" for text in asked.texts]


def _row(name: str, model: dict[str, Any], cost: Cost | None) -> str:
    agreement = model["agreement"]
    texts = ", ".join(f"{text} {found['perplexity']:.2f}" for text, found in model["tasks"].items())
    spent = ["", ""] if cost is None else [f"{cost.seconds:.0f}", f"{cost.peak:.0f}"]
    kl = "0" if agreement is None else f"{agreement['kl']:.4f}"
    return "| " + " | ".join([name, kl, f"{model['perplexity']:.2f}", texts, *spent]) + " |"


if __name__ == "__main__":
    main()
