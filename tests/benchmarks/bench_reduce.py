"""What the ways to drop or merge experts cost and keep: `python tests/benchmarks/bench_reduce.py [mixtral|embedded]`.

Prints one Markdown row per setting: bytes, KL(original || result), top-1 agreement and perplexity on held-out text, and
the seconds of the reduction beside those of a plain transformers forward pass over the same calibration tokens.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from moetools.checkpoint.reader import open_checkpoint
from moetools.demo import demo_data_path, demo_model_path
from moetools.forward.streaming import ForwardOptions
from moetools.verbs.compress import CompressOptions, merge_experts, prune_experts
from moetools.verbs.evaluate import evaluate
from moetools.verbs.options import DataOptions, load_tokens

SHARED = Path(__file__).resolve().parents[3] / "shared"
CPU = ForwardOptions(device="cpu")
JOINT = {"refit": "joint", "sequential": True}
Setting = tuple[str, str, dict]
BASIC: list[Setting] = [
    ("prune", "reap", {}),
    ("prune", "reap", JOINT),
    ("prune", "reap", JOINT | {"refit": "blocked"}),
    ("prune", "auto", {}),
    ("merge", "ream", {}),
    ("merge", "joint", {}),
    ("merge", "auto", {}),
]
MORE: list[Setting] = [
    ("prune", "naee", {}),
    ("merge", "hc-smoe", {}),
    ("merge", "m-smoe", {}),
    ("merge", "ream", {"refit": "joint", "router": "fitted"}),
    ("merge", "joint", {"heal": 160}),
]
STRONG: list[Setting] = [("prune", "reap", JOINT), ("merge", "joint", {}), ("merge", "auto", {})]


def main(name: str) -> None:
    torch.set_num_threads(2)
    transformers.logging.disable_progress_bar()
    if name == "mixtral":
        tasks = ("code", "math", "plays", "reviews", "german")
        model, plan = SHARED / "models" / "mixtral-8x9m", {6: BASIC, 4: BASIC + MORE, 2: STRONG}
        calibration = DataOptions(data=[f"cal={SHARED}/data/calibration.safetensors"], seq_len=256)
        test = DataOptions(data=[f"{task}={SHARED}/data/{task}/test.jsonl" for task in tasks], seq_len=256)
    else:
        tasks = ("arithmetic", "code", "french", "prose")
        model, plan = demo_model_path(), {12: BASIC, 8: BASIC + MORE}
        folder = demo_data_path()
        calibration = DataOptions(data=[f"{task}={folder}/{task}/calibration.jsonl" for task in tasks], seq_len=256)
        test = DataOptions(data=[f"{task}={folder}/{task}/test.jsonl" for task in tasks], seq_len=256)
    plain = plain_seconds(model, calibration)
    print(f"plain forward over the calibration tokens: {plain:.2f} s\n", flush=True)
    print(
        "| experts | setting | MB | KL | top-1 % | perplexity | seconds | times a plain pass |\n|" + "---|" * 8,
        flush=True,
    )
    for target, settings in plan.items():
        with tempfile.TemporaryDirectory() as folder:
            outs = {Path(folder) / str(number): setting for number, setting in enumerate(settings)}
            seconds = [reduce(model, out, setting, target, calibration) for out, setting in outs.items()]
            found = evaluate(list(outs), test, CPU, reference=model).to_json()["models"][1:]
        for setting, taken, measured in zip(settings, seconds, found, strict=True):
            print(row(setting, target, measured, taken, plain), flush=True)


def plain_seconds(model: Path, calibration: DataOptions) -> float:
    """The best of three stock forward passes over the calibration tokens."""
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    data = load_tokens(calibration, open_checkpoint(model), stock.config.vocab_size)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in data.batches:
                stock(input_ids=batch.input_ids, use_cache=False)
        best = min(best, time.perf_counter() - start)
    return best


def reduce(model: Path, out: Path, setting: Setting, target: int, calibration: DataOptions) -> float:
    """Write `out`; seconds of the whole command's work, verification included."""
    verb, method, settings = setting
    function = prune_experts if verb == "prune" else merge_experts
    start = time.perf_counter()
    function(model, out, calibration, CPU, CompressOptions(method=method, target=target, **settings), command="bench")
    return time.perf_counter() - start


def row(setting: Setting, target: int, found: dict, seconds: float, plain: float) -> str:
    verb, method, settings = setting
    flags = " ".join(f"--{key} {value}" if value is not True else f"--{key}" for key, value in settings.items())
    quality = f"{found['agreement']['kl']:.4f} | {100 * found['agreement']['top1']:.1f} | {found['perplexity']:.2f}"
    name = f"{verb} {method} {flags}".strip()
    return f"| {target} | {name} | {found['nbytes'] / 1e6:.2f} | {quality} | {seconds:.1f} | {seconds / plain:.1f} |"


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "mixtral")
