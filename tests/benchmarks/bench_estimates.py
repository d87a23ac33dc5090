"""What `--dry-run` says a run will take, against what it takes.

    python tests/benchmarks/bench_estimates.py MODEL [--tokens 16384] [--rows "prune reap"] [--text FILE ...]
    python tests/benchmarks/bench_estimates.py synthetic:qwen3-30b-a3b --layers 2 --tokens 2048

The rows of bench_size.py that write, and two that train, in one process, each in the order: dry run, run, dry run; the
ratio is the mean estimate over the seconds of the run, whole verb with verification. Between .7 and 1.3 is what the
estimate promises.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bench_size import ROWS, half
from synthetic import write_synthetic, write_tokens

import moetools

_WRITING = {row: what for row, what in ROWS.items() if row not in ("plain", "inspect-routing", "evaluate")} | {
    "prune reap, healed": ("prune_experts", {"method": "reap", "heal": 100}),
    "distill, trained": ("distill", {"steps": 100}),
}


def arguments(row: str, model: Path, texts: list[Path], running: dict[str, Any]) -> dict[str, Any]:
    """Of the function of a row."""
    verb, options = _WRITING[row]
    count = {"prune_experts": "keep", "merge_experts": "to", "route_tasks": "keep"}.get(verb)
    data: dict[str, Any] = {f"task{number}": file for number, file in enumerate(texts)}
    given = {"data": data, **running, **options}
    if count is not None:
        given[count] = half(model)
    return given


def measure(row: str, model: Path, texts: list[Path], running: dict[str, Any]) -> tuple[float, float, float]:
    """Expected and real seconds, and those of the dry run."""
    call = getattr(moetools, _WRITING[row][0])
    with tempfile.TemporaryDirectory() as scratch:
        out, given = Path(scratch) / "out", arguments(row, model, texts, running)

        def dry() -> tuple[float, float]:
            start = time.monotonic()
            expected = call(model, out, **given, dry_run=True).seconds["expected"]
            return expected, time.monotonic() - start

        first = dry()
        start = time.monotonic()
        call(model, out, **given)
        took = time.monotonic() - start
        shutil.rmtree(out)
        second = dry()
    return (first[0] + second[0]) / 2, took, (first[1] + second[1]) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--memory-budget", default=None)
    parser.add_argument("--text", type=Path, nargs="*")
    parser.add_argument("--rows", nargs="*", default=list(_WRITING))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, texts = Path(chosen.model), chosen.text
        if chosen.model.startswith("synthetic:"):
            model = Path(folder) / "model"
            write_synthetic(chosen.model.split(":")[1], model, layers=chosen.layers)
            texts = None
        running: dict[str, Any] = {"samples": max(1, chosen.tokens // chosen.seq_len), "seq_len": chosen.seq_len}
        if chosen.memory_budget:
            running["memory_budget"] = chosen.memory_budget
        if texts is None:
            vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
            texts = write_tokens(Path(folder), vocabulary, chosen.tokens, name="text", seed=0)
        print("| recipe | expected, s | took, s | expected / took | the dry run itself, s |")
        print("|---|---|---|---|---|")
        for row in chosen.rows:
            expected, took, dry = measure(row, model, texts, running)
            print(f"| {row} | {expected:.1f} | {took:.1f} | {expected / took:.2f} | {dry:.1f} |", flush=True)


if __name__ == "__main__":
    main()
