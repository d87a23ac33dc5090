"""Placements judged on held-out load, and what inspect-routing costs: `python tests/benchmarks/bench_placement.py`.

Takes ../shared's model and text where they are; the embedded model always.
"""

import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import moetools
from moetools.formats.reader import open_model
from moetools.forward.calibrate import collect_statistics
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.text.options import DataOptions, load_tokens

DEMO = Path(str(files("moetools.demo")))
SHARED = Path(__file__).parents[3] / "shared"
DEVICES = (2, 4)
SIZES = {"seq_len": 512, "samples": 128}
CPU = {"device": "cpu", "dtype": "float32"}


def models() -> dict[str, tuple[Path, list[str]]]:
    demo = [f"{file.parent.name}={file}" for file in sorted((DEMO / "data").glob("*/calibration.jsonl"))]
    found = {"embedded": (DEMO / "model", demo)}
    if SHARED.is_dir():
        text = [f"{file.parent.name}={file}" for file in sorted((SHARED / "data").glob("*/train.jsonl"))]
        found["mixtral-8x9m"] = (SHARED / "models" / "mixtral-8x9m", text)
    return found


def placements(name: str, model: Path, text: list[str]) -> None:
    """Means over layers of what the held-out fifth of the sequences says."""
    for devices in DEVICES:
        found = moetools.inspect_routing(model, data=text, devices=devices, **SIZES, **CPU).placement
        assert found is not None
        pairs = [(one.planned, one.linear) for one in found.layers if one.linear is not None]
        planned, linear = (sum(pair[side].imbalance for pair in pairs) / len(pairs) for side in (0, 1))
        visits = [sum(pair[side].devices_per_token for pair in pairs) / len(pairs) for side in (0, 1)]
        row = f"| {name} | {devices} | {linear:.3f} | {planned:.3f} | {visits[1]:.2f} | {visits[0]:.2f} |"
        print(f"{row} {permuted(model, text, devices):.1e} |", flush=True)


@torch.no_grad()
def permuted(model: Path, text: list[str], devices: int) -> float:
    """Largest difference of stock's fp32 logits once experts have changed places, over the largest logit."""
    with tempfile.TemporaryDirectory() as folder:
        moetools.place_experts(model, Path(folder) / "out", data=text, devices=devices, **SIZES, **CPU)
        before, after = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (model, Path(folder) / "out")
        )
        ids = torch.randint(2, before.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
        old, new = before(ids).logits, after(ids).logits
    return ((old - new).abs().max() / old.abs().max()).item()


def seconds(work: Callable[[], object]) -> float:
    took = []
    for _ in range(3):
        start = time.process_time()
        work()
        took.append(time.process_time() - start)
    return min(took)


def cost(name: str, model: Path, text: list[str]) -> None:
    checkpoint, forward = open_model(model), ForwardOptions(**CPU)
    data = DataOptions(data=text, **SIZES)

    def plain() -> None:
        streamed = StreamedModel(checkpoint, forward)
        collect_statistics(streamed, load_tokens(data, checkpoint, streamed.vocab_size), [])

    base = seconds(plain)
    full = seconds(lambda: moetools.inspect_routing(model, data=text, **SIZES, **CPU))
    alike = seconds(lambda: moetools.inspect_routing(model, data=text, similarity=True, **SIZES, **CPU))
    print(f"| {name} | {base:.1f} s | {full / base:.2f} x | {alike / base:.2f} x |", flush=True)


if __name__ == "__main__":
    print("| model | devices | linear | planned | visits, linear | planned | logits' difference |")
    print("|---|---|---|---|---|---|---|")
    for name, (model, text) in models().items():
        placements(name, model, text)
    print("\n| model | plain pass | inspect-routing | with similarity |\n|---|---|---|---|")
    for name, (model, text) in models().items():
        cost(name, model, text)
