"""CPU seconds of `inspect` on headers of a large model, and of `--help`: `python tests/benchmarks/bench_inspect.py`."""

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYERS, EXPERTS, HIDDEN, WIDTH = 94, 128, 4096, 1536
"""Of Qwen3-235B-A22B."""
GOALS = {"inspect": 2.0, "--help": 0.5}


def write_headers(folder: Path) -> int:
    """Safetensors files whose tensors are holes; returns the number of tensors."""
    config = {"model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": 8}
    config |= {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "vocab_size": 1000}
    weight_map: dict[str, str] = {}
    for layer in range(-1, LAYERS):
        shapes = {"model.embed_tokens.weight": (1000, HIDDEN)} if layer < 0 else layer_shapes(layer)
        header, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        text, file = json.dumps(header).encode(), f"model-{layer + 1:05d}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return len(weight_map)


def layer_shapes(layer: int) -> dict[str, tuple[int, int]]:
    shapes = {f"model.layers.{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN)}
    for expert in range(EXPERTS):
        prefix = f"model.layers.{layer}.mlp.experts.{expert}."
        shapes |= {f"{prefix}{name}_proj.weight": (WIDTH, HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}down_proj.weight"] = (HIDDEN, WIDTH)
    return shapes


def cpu_seconds(*arguments: str) -> tuple[float, float]:
    """CPU and wall seconds of the command in a process of its own."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "moetools", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tensors = write_headers(Path(folder))
        for name, arguments in (("inspect", ("inspect", folder)), ("--help", ("--help",))):
            cpu, wall = min(cpu_seconds(*arguments) for _ in range(3))
            about = f", {tensors} tensors" if name == "inspect" else ""
            print(f"{name}: {cpu:.2f} CPU s, {wall:.2f} s (goal {GOALS[name]}){about}")


if __name__ == "__main__":
    main()
