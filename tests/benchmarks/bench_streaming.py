"""What streaming costs in time and saves in memory.

    python tests/benchmarks/bench_streaming.py time [--model DIR] [--data FILE]    calibration / plain forward pass
    python tests/benchmarks/bench_streaming.py memory                              a checkpoint 4x larger than its cap

`time` compares calibration (load, reap, mean_output) with a plain transformers forward pass over the same tokens, by
turns in one process. `memory` writes a synthetic Mixtral checkpoint of 1.8 GB to a temporary folder and calibrates on
it twice: as users run it, and in a process whose data the kernel limits to the cap above what the imports take.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 44,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 4096,
    "torch_dtype": "bfloat16",
}
CAP = 400 * 10**6
BUDGET = 350 * 10**6
"""What `--memory-budget` says; the rest of the cap is for what malloc cannot give back and for Python."""


def bench_time(model: Path, data: Path, repeats: int) -> None:
    from transformers import AutoModelForCausalLM

    from moetools.checkpoint.reader import open_checkpoint
    from moetools.forward.calibrate import collect_statistics
    from moetools.forward.options import ForwardOptions
    from moetools.forward.streaming import StreamedModel
    from moetools.text.sources import parse_data_option
    from moetools.text.tokens import load_token_data

    torch.set_num_threads(2)
    tokens = load_token_data(parse_data_option([f"calibration={data}"]), None, seq_len=256, batch_size=8)
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    streamed = StreamedModel(open_checkpoint(model), ForwardOptions(device="cpu"))
    plain, calibration = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in tokens.batches:
                mask = None if batch.attention_mask is None else batch.attention_mask.long()
                stock(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)
        plain.append(time.perf_counter() - start)
        start = time.perf_counter()
        collect_statistics(streamed, tokens, ["load", "reap", "mean_output"])
        calibration.append(time.perf_counter() - start)
    # The first turn warms both up.
    ours, theirs = statistics.median(calibration[1:]), statistics.median(plain[1:])
    print(f"calibration {ours:.2f} s, plain forward {theirs:.2f} s over {tokens.num_tokens} tokens ({repeats} turns)")
    print(f"ratio {ours / theirs:.2f} (target <= 1.25)")


def write_mixtral(folder: Path) -> int:
    """One shard per layer, so that writing needs no more memory than a layer; returns the bytes written."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    width, inner, vocab = (MIXTRAL[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    shards = [
        {
            "model.embed_tokens.weight": random(vocab, width),
            "lm_head.weight": random(vocab, width),
            "model.norm.weight": torch.ones(width).bfloat16(),
        }
    ]
    weight_map: dict[str, str] = {}
    total = 0
    for layer in range(MIXTRAL["num_hidden_layers"] + 1):
        if layer:
            prefix = f"model.layers.{layer - 1}"
            moe = f"{prefix}.block_sparse_moe"
            shards = [{f"{prefix}.self_attn.{name}_proj.weight": random(width, width) for name in "qkvo"}]
            shards[0] |= {
                f"{prefix}.{name}_layernorm.weight": torch.ones(width).bfloat16()
                for name in ("input", "post_attention")
            }
            shards[0][f"{moe}.gate.weight"] = random(MIXTRAL["num_local_experts"], width)
            for expert in range(MIXTRAL["num_local_experts"]):
                shards[0] |= {f"{moe}.experts.{expert}.{name}.weight": random(inner, width) for name in ("w1", "w3")}
                shards[0][f"{moe}.experts.{expert}.w2.weight"] = random(width, inner)
        file = f"model-{layer:05d}.safetensors"
        save_file(shards[0], folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shards[0], file)
        total += sum(tensor.nbytes for tensor in shards[0].values())
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def calibrate(folder: Path, *, limited: bool) -> None:
    """Runs in a process of its own: prints its peak of anonymous memory above the imports, and the plan, as JSON."""
    from moetools.checkpoint.reader import open_checkpoint
    from moetools.forward.calibrate import collect_statistics
    from moetools.forward.options import ForwardOptions
    from moetools.forward.streaming import StreamedModel, describe_memory
    from moetools.text.tokens import TokenBatch, TokenData

    torch.set_num_threads(2)
    threading.stack_size(1 << 20)
    torch.randn(512, 512) @ torch.randn(512, 512)
    ids = torch.randint(4096, (16, 256), generator=torch.Generator().manual_seed(0))
    batches = tuple(
        TokenBatch(input_ids=rows, attention_mask=None, task=torch.zeros(2).long()) for rows in ids.split(2)
    )
    data = TokenData(tasks=("random",), batches=batches, fingerprint="", seq_len=256)
    baseline, peak, done = status_bytes("RssAnon"), 0, threading.Event()
    # The kernel counts torch's mappings of the shards being read as data; they are file pages, not memory of ours.
    mapped = 2 * max(shard.stat().st_size for shard in folder.glob("*.safetensors"))
    if limited:
        resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + CAP + mapped,) * 2)

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, status_bytes("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    try:
        model = StreamedModel(open_checkpoint(folder), ForwardOptions(device="cpu", memory_budget=BUDGET))
        plan = model.memory_plan(batches)
        collected = collect_statistics(model, data, ["load", "reap", "mean_output"])
    finally:
        done.set()
        sampler.join()
    assert len(collected.layers) == MIXTRAL["num_hidden_layers"]
    seconds = time.perf_counter() - start
    print(json.dumps({"peak": peak - baseline, "plan": plan.peak, "how": describe_memory(plan), "seconds": seconds}))


def bench_memory() -> None:
    with tempfile.TemporaryDirectory(prefix="moetools-bench-") as name:
        total = write_mixtral(Path(name))
        print(f"checkpoint {total / 1e6:.0f} MB, cap {CAP / 1e6:.0f} MB: ratio {total / CAP:.1f} (at least 4)")
        report("as users run it", total, in_child("calibrate", name))
        # The kernel limits address space: glibc's empty arenas would count, so large blocks come from mmap here.
        mapped = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        report("under a hard limit at the cap", total, in_child("calibrate-limited", name, **mapped))


def in_child(command: str, folder: str, **environment: str) -> dict[str, Any]:
    child = [sys.executable, __file__, command, folder]
    found = subprocess.run(child, check=True, stdout=subprocess.PIPE, env=os.environ | environment)
    return json.loads(found.stdout)


def report(how: str, total: int, found: dict[str, Any]) -> None:
    peak, plan = found["peak"], found["plan"]
    print(f"{how}: {found['how']}; {found['seconds']:.0f} s")
    print(
        f"  peak of anonymous memory {peak / 1e6:.0f} MB: peak / planned {peak / plan:.2f}, peak / cap {peak / CAP:.2f}"
    )
    print(f"  checkpoint / peak {total / peak:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("time")
    shared = Path(__file__).parents[3] / "shared"
    timing.add_argument("--model", type=Path, default=shared / "models" / "mixtral-8x9m")
    timing.add_argument("--data", type=Path, default=shared / "data" / "calibration.safetensors")
    timing.add_argument("--repeats", type=int, default=5)
    commands.add_parser("memory")
    for name in ("calibrate", "calibrate-limited"):
        commands.add_parser(name).add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "time":
        bench_time(args.model, args.data, args.repeats)
    elif args.command == "memory":
        bench_memory()
    else:
        calibrate(args.folder, limited=args.command == "calibrate-limited")


if __name__ == "__main__":
    main()
