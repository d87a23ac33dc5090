"""Every verb on layers of real size: time as multiples of a plain pass, memory, bytes read.

    python tests/benchmarks/bench_size.py --shape qwen3-30b-a3b --layers 2 --tokens 4096 --memory-budget 8GiB
    python tests/benchmarks/bench_size.py --shape qwen3-30b-a3b --layers 2 --tokens 65536 --device cuda --batch-size 64
    python tests/benchmarks/bench_size.py growth

The checkpoint is synthetic (synthetic.py). Every row runs in a process of its own: a warm-up of the device, then the
verb without verification; "plain" runs the tokens through all layers and measures nothing. Seconds are those of the
verb without imports (CPU seconds with --cpu-time, for a machine that is shared); peak memory is anonymous memory above
that of the idle process with torch on a CPU, and allocated memory on a GPU; with --limit the kernel refuses more than
the budget and 10 %. A row that fails says so and the next one runs.

`growth` prints exponents: how the time of a row grows when tokens, experts, width or layers are doubled.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "inspect-routing": ("inspect_routing", {}),
    "evaluate": ("evaluate", {}),
    "prune reap": ("prune_experts", {"method": "reap"}),
    "prune reap, joint refit": ("prune_experts", {"method": "reap", "refit": "joint"}),
    "merge hc-smoe": ("merge_experts", {"method": "hc-smoe"}),
    "merge joint": ("merge_experts", {"method": "joint"}),
    "merge auto": ("merge_experts", {"method": "auto"}),
    "quantize w4a16 gptq": ("quantize", {"scheme": "w4a16", "method": "gptq"}),
    "quantize mixed 2.5": ("quantize", {"scheme": "mixed", "bits": 2.5}),
    "quantize sub1 1.0": ("quantize", {"scheme": "sub1", "bits": 1.0}),
    "route-tasks": ("route_tasks", {}),
    "distill, closed form": ("distill", {"local_steps": 0}),
}
GROWTH_ROWS = ("plain", "prune reap", "prune reap, joint refit", "merge joint", "quantize w4a16 gptq")
_MB = 10**6
_MAPPED = 3
"""Shards that torch maps at a time; the kernel counts a private mapping as data, though it takes no memory."""


def half(model: Path) -> int:
    """Half of the model's experts."""
    config = json.loads((model / "config.json").read_text())
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    return next(config[key] for key in keys if key in config) // 2


def call(row: str, model: Path, files: Sequence[Path], running: dict[str, Any], out: Path) -> None:
    """Do what the row measures."""
    verb, options = ROWS[row]
    data = {f"task{number}": str(file) for number, file in enumerate(files)}
    asked: dict[str, Any] = {**options, **running, "data": data, "samples": "all"}
    if verb == "plain":
        plain_pass(model, data, running)
        return
    import moetools

    if verb == "evaluate":
        moetools.evaluate(str(model), **asked)
    elif verb == "inspect_routing":
        moetools.inspect_routing(str(model), **asked)
    else:
        fewer = {"prune_experts": "keep", "merge_experts": "to", "route_tasks": "keep"}
        if verb in fewer:
            asked[fewer[verb]] = half(model)
        getattr(moetools, verb)(str(model), str(out), verify=False, **asked)


def plain_pass(model: Path, data: dict[str, str], running: dict[str, Any]) -> None:
    from moetools.formats.reader import open_model
    from moetools.forward.calibrate import collect_statistics
    from moetools.forward.options import ForwardOptions
    from moetools.forward.streaming import StreamedModel
    from moetools.text.options import DataOptions, load_tokens

    kept = {name: running[name] for name in ("device", "memory_budget") if name in running}
    streamed = StreamedModel(open_model(model), ForwardOptions(**kept))
    text = DataOptions(
        data=[f"{name}={path}" for name, path in data.items()],
        seq_len=running["seq_len"],
        batch_size=running.get("batch_size"),
        samples="all",
    )
    collect_statistics(streamed, load_tokens(text, streamed.checkpoint, streamed.vocab_size), [])


class Watched:
    """Most anonymous memory of this process while it lives."""

    def __init__(self) -> None:
        self.peak = self.first = anonymous()
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, anonymous())

    def stop(self) -> int:
        self._stop.set()
        return self.peak - self.first


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def run_row(chosen: argparse.Namespace) -> None:
    """In a process of its own: prints one line of JSON."""
    import moetools
    import moetools.verbs.distill.verb
    import moetools.verbs.evaluate.verb
    import moetools.verbs.inspect.routing
    import moetools.verbs.quantize.verb
    import moetools.verbs.reduce.verb
    import moetools.verbs.route.verb  # noqa: F401 - what is measured begins behind the imports

    cuda = chosen.device.startswith("cuda")
    if cuda:
        square = torch.randn(4096, 4096, device=chosen.device, dtype=torch.bfloat16)
        torch.linalg.cholesky(torch.eye(64, device=chosen.device))
        (square @ square).sum().item()
        del square
        torch.cuda.reset_peak_memory_stats()
    elif chosen.limit:
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        files = [file.stat().st_size for file in chosen.model.glob("*.safetensors")]
        threading.stack_size(1 << 20)
        most = used + int(1.1 * chosen.budget_bytes) + _MAPPED * max(files)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    running: dict[str, Any] = {"device": chosen.device, "seq_len": chosen.seq_len}
    running |= {"memory_budget": chosen.memory_budget} if chosen.memory_budget else {}
    running |= {"batch_size": chosen.batch_size} if chosen.batch_size else {}
    files = sorted(chosen.model.glob("calibration-*.safetensors"))
    watched, read, start, cpu = Watched(), bytes_read(), time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(dir=chosen.model.parent) as scratch:
        call(chosen.row, chosen.model, files, running, Path(scratch) / "out")
        if cuda:
            torch.cuda.synchronize()
        found = {
            "seconds": time.perf_counter() - start,
            "cpu": time.process_time() - cpu,
            "peak": torch.cuda.max_memory_allocated() if cuda else watched.stop(),
            "read": bytes_read() - read,
        }
        records = [json.loads(file.read_text()) for file in Path(scratch).glob("out/moetools.json")]
        found["stages"] = records[0].get("seconds", {}) if records else {}
    print(json.dumps(found))


def measure(row: str, model: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """The row's line, or what went wrong."""
    command = [sys.executable, __file__, "--row", row, "--model", str(model), "--device", chosen.device]
    command += ["--seq-len", str(chosen.seq_len)]
    for name in ("memory_budget", "batch_size"):
        if getattr(chosen, name):
            command += [f"--{name.replace('_', '-')}", str(getattr(chosen, name))]
    command += ["--limit"] if chosen.limit else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=chosen.timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"more than {chosen.timeout} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:150]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def peak_flops(device: str) -> float:
    """bf16 operations per second of one large matrix product."""
    size = 8192
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        left @ left
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        left @ left
    torch.cuda.synchronize()
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def experts_rate(model: Path, tokens: int, device: str) -> float:
    """Operations per second of one layer's experts while REAP's statistic looks on, routing and sorting included."""
    from moetools.formats.reader import open_model
    from moetools.forward.calibrate import load_statistic
    from moetools.forward.options import ForwardOptions
    from moetools.forward.streaming import LayerObserver, StreamedModel
    from moetools.text.tokens import TokenBatch

    streamed = StreamedModel(open_model(model), ForwardOptions(device=device))
    layer = next(iter(streamed.layers(resident=True)))
    shape, statistic = streamed.layer_shape(1), load_statistic("reap")
    state = statistic.init(shape, streamed.device)
    observer = LayerObserver(lambda batch: statistic.update(state, batch))
    ids = torch.zeros(tokens // 512, 512, dtype=torch.int64, device=device)
    observer.batch = TokenBatch(input_ids=ids, attention_mask=None, task=torch.zeros(len(ids), dtype=torch.int64))
    hidden = torch.randn(*ids.shape, shape.hidden_size, device=device, dtype=streamed.dtype)
    block = layer.module.get_submodule(streamed.stock.moe_layers[layer.index].block)
    with torch.inference_mode(), streamed.observe(layer, statistic.reads, observer):
        for turn in range(4):
            if turn == 1:
                torch.cuda.synchronize()
                start = time.perf_counter()
            block(hidden)
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / 3
    return 6 * ids.numel() * shape.top_k * shape.hidden_size * shape.expert_size / seconds


def table(chosen: argparse.Namespace) -> dict[str, Any]:
    """Run the rows on one checkpoint and print them as they come."""
    from synthetic import SHAPES, write_synthetic, write_tokens

    clock = "cpu" if chosen.cpu_time else "seconds"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=chosen.scratch) as scratch:
        model = Path(scratch) / "model"
        start = time.perf_counter()
        write_synthetic(chosen.shape, model, layers=chosen.layers, device=chosen.device, sizes=chosen.sizes)
        vocabulary = {**SHAPES[chosen.shape], **chosen.sizes}["vocab_size"]
        write_tokens(model, vocabulary, chosen.tokens, name="calibration", seed=0)
        size = sum(file.stat().st_size for file in model.iterdir())
        print(f"{chosen.shape} {chosen.sizes or ''}: {chosen.layers} layers, {chosen.tokens} tokens, "
              f"{size / 1e9:.2f} GB written in {time.perf_counter() - start:.0f} s, {chosen.device}")  # fmt: skip
        if chosen.device.startswith("cuda"):
            peak, rate = peak_flops(chosen.device), experts_rate(model, chosen.tokens, chosen.device)
            print(f"{torch.cuda.get_device_name()}: {peak / 1e12:.0f} TFLOP/s in one bf16 product; experts of a layer "
                  f"with REAP's statistic {rate / 1e12:.0f} TFLOP/s, {rate / peak:.0%}")  # fmt: skip
        print(f"| row | {'CPU ' if chosen.cpu_time else ''}s | s a layer | x plain | peak MB | read GB | stages, s |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for row in chosen.rows:
            found[row] = one = measure(row, model, chosen)
            if "error" in one:
                print(f"| {row} | {one['error']} | | | | | |", flush=True)
                continue
            plain = found.get("plain", {}).get(clock)
            times = f"{one[clock] / plain:.1f}" if plain else ""
            stages = ", ".join(f"{name} {value:.1f}" for name, value in one["stages"].items())
            print(f"| {row} | {one[clock]:.1f} | {one[clock] / chosen.layers:.2f} | {times} "
                  f"| {one['peak'] / _MB:,.0f} | {one['read'] / 1e9:.2f} "
                  f"| {stages} |", flush=True)  # fmt: skip
    return found


def growth(chosen: argparse.Namespace) -> dict[str, Any]:
    """log2 of the ratio of CPU times when one size is doubled, the others staying."""
    small = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 32, "num_experts_per_tok": 4,
             "vocab_size": 4096, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
    doubled: dict[str, tuple[dict[str, int], int, int]] = {
        "": ({}, 1, 1),
        "tokens": ({}, 2, 1),
        "experts": ({"num_experts": 64}, 1, 1),
        "expert width": ({"moe_intermediate_size": 512}, 1, 1),
        "hidden size": ({"hidden_size": 512}, 1, 1),
        "layers": ({}, 1, 2),
    }
    tokens, layers, found = chosen.tokens, chosen.layers, {}
    chosen.shape, chosen.cpu_time = "qwen3-30b-a3b", True
    for name, (sizes, more_tokens, more_layers) in doubled.items():
        chosen.sizes, chosen.tokens, chosen.layers = {**small, **sizes}, tokens * more_tokens, layers * more_layers
        found[name] = table(chosen)
    names = [name for name in doubled if name]
    print("\n| row | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for row in chosen.rows:
        first = found[""][row].get("cpu")
        cells = [found[name][row].get("cpu") for name in names]
        print(f"| {row} | " + " | ".join(f"{math.log2(cell / first):.2f}" if cell and first else "" for cell in cells)
              + " |")  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["table", "growth"], default="table")
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-budget")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW")
    parser.add_argument("--limit", action="store_true", help="the kernel refuses more than the budget and 10 %%")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--timeout", type=float, default=3600)
    parser.add_argument("--scratch", help="folder for the checkpoint")
    parser.add_argument("--out", type=Path, help="all numbers as JSON")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.sizes = {}
    if chosen.row:
        from moetools.sizes import parse_bytes

        chosen.budget_bytes = parse_bytes(chosen.memory_budget) if chosen.memory_budget else 1 << 62
        run_row(chosen)
        return
    made: Callable[[argparse.Namespace], dict[str, Any]] = growth if chosen.what == "growth" else table
    chosen.rows = chosen.rows or list(GROWTH_ROWS if chosen.what == "growth" else ROWS)
    found = made(chosen)
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
