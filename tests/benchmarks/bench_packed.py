"""Pruning a layer of DeepSeek-V3's shape in FP8 blocks: packed bytes kept, and decoded.

    python tests/benchmarks/bench_packed.py --experts 16 --memory-budget 12GiB

The checkpoint has one layer of real width with random FP8 codes and scales, a small vocabulary and as many experts as
asked for; half are pruned by REAP. Every row is a process of its own, verification off; peak memory is that of the
process, imports included.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from safetensors.torch import save_file
from synthetic import SHAPES, Maker, write_tokenizer
from torch import Tensor

BLOCK = 128
VOCABULARY = 8192


def fp8(name: str, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Random codes, none of them NaN, and the scale of every block."""
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0
    scale = 0.5 + torch.rand([-(-size // BLOCK) for size in shape], generator=generator)
    return {name: codes.view(torch.float8_e4m3fn), f"{name}_scale_inv": scale * 0.02 / shape[-1] ** 0.5}


def write_checkpoint(out: Path, experts: int, tokens: int, sizes: dict[str, int]) -> None:
    one_group = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 4}
    config = {**SHAPES["deepseek-v3"], "num_hidden_layers": 1, "vocab_size": VOCABULARY, "dtype": "bfloat16"}
    config |= {"n_routed_experts": experts, **(one_group if experts < 64 else {}), **sizes}
    make, generator = Maker(config, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    found = make.rest()
    made = Maker({**config, "n_routed_experts": 1}, torch.Generator().manual_seed(0)).layer(0)
    for name, tensor in made.items():
        if ".experts." in name or ".mlp.gate" in name:
            continue
        packed = tensor.dim() == 2
        found |= fp8(name, tuple(tensor.shape), generator) if packed else {name: tensor}
    for expert in range(experts):
        for name in ("gate_proj", "up_proj", "down_proj"):
            own = f"model.layers.0.mlp.experts.{expert}.{name}.weight"
            found |= fp8(own, tuple(made[own.replace(f".{expert}.", ".0.")].shape), generator)
    found["model.layers.0.mlp.gate.weight"] = make.router(experts)
    found["model.layers.0.mlp.gate.e_score_correction_bias"] = 0.05 * torch.randn(experts, generator=generator)
    out.mkdir(parents=True)
    save_file(found, out / "model.safetensors", {"format": "pt"})
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (out / "config.json").write_text(json.dumps(config))
    write_tokenizer(out, VOCABULARY)
    ids = torch.randint(0, VOCABULARY, (tokens // 32, 32), generator=generator)
    save_file({"input_ids": ids}, out / "calibration.safetensors")


def run_row(model: Path, form: str, budget: str | None) -> None:
    """In a process of its own: prints one line of JSON."""
    import moetools

    start, asked = time.perf_counter(), {} if budget is None else {"memory_budget": budget}
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        report = moetools.prune_experts(
            str(model),
            f"{scratch}/out",
            ratio=0.5,
            output_format=form,
            data={"a": str(model / "calibration.safetensors")},
            seq_len=32,
            samples="all",
            device="cpu",
            dtype="bfloat16",
            verify=False,
            **asked,
        ).to_json()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found: dict[str, Any] = {"seconds": time.perf_counter() - start, "peak": peak, "stages": report["seconds"]}
    print(json.dumps(found | {"before": report["before"]["bytes"], "after": report["after"]["bytes"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--memory-budget")
    parser.add_argument("--sizes", type=json.loads, default={}, help="entries of config.json, as JSON")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.row:
        run_row(chosen.model, chosen.row, chosen.memory_budget)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        write_checkpoint(model, chosen.experts, chosen.tokens, chosen.sizes)
        print(
            "| output | measure, s | write, s | peak GB | GB before | GB after |\n|---|---|---|---|---|---|", flush=True
        )
        for form in ("same", "bf16"):
            command = [sys.executable, __file__, "--row", form, "--model", str(model)]
            command += ["--memory-budget", chosen.memory_budget] if chosen.memory_budget else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            one = json.loads(done.stdout.splitlines()[-1])
            stages = one["stages"]
            print(f"| {form} | {stages['prepare']:.1f} | {stages['write']:.1f} | {one['peak'] / 1e9:.2f} "
                  f"| {one['before'] / 1e9:.2f} | {one['after'] / 1e9:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
