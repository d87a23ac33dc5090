"""What the memory plan promises, under a hard limit in a process of its own, and what a dry run says of the output."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from writing_verbs import CPU, Material

from moetools.pipeline.options import Writing
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.quantize.verb import quantize
from moetools.verbs.reduce.options import MergeOptions, PruneOptions
from moetools.verbs.reduce.verb import merge_experts, prune_experts

BUDGET = 26_000_000
LAYERS = 44
SOLVING = {"merge": 40_000_000, "quantize": 64_000_000, "route": 44_000_000, "distill": 56_000_000}
"""Budgets of verbs that solve something in each layer."""
SHORT = int(os.environ.get("MOETOOLS_MEMORY_LAYERS", "2"))
"""Layers of their model: 98 make it four times the largest budget, and the test some minutes longer."""
WIDTH, INNER, EXPERTS, HEADS = 768, 128, 4, 2
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 128,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": 16,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write_mixtral(folder: Path, *, layers: int, width: int, seed: int) -> int:
    """A random bf16 Mixtral, a file for each layer; its bytes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"self_attn.{name}_proj.weight": (HEADS * 16, width) for name in "qkv"}
    shapes |= {"self_attn.o_proj.weight": (width, HEADS * 16), "block_sparse_moe.gate.weight": (EXPERTS, width)}
    for expert in range(EXPERTS):
        for name, shape in (("w1", (INNER, width)), ("w2", (width, INNER)), ("w3", (INNER, width))):
            shapes[f"block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    weight_map, total = {}, 0
    for layer in range(layers):
        prefix, ones = f"model.layers.{layer}", torch.ones(width, dtype=torch.bfloat16)
        tensors = {f"{prefix}.{name}_layernorm.weight": ones.clone() for name in ("input", "post_attention")}
        made = {f"{prefix}.{name}": shape for name, shape in shapes.items()}
        if layer == 0:
            made |= {"model.embed_tokens.weight": (128, width), "lm_head.weight": (128, width)}
            tensors["model.norm.weight"] = ones
        for name, (rows, columns) in made.items():
            tensors[name] = (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    config = MIXTRAL | {"hidden_size": width, "intermediate_size": INNER, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four times the budget, another to compare it with, a tiny pair, and text."""
    made = tmp_path_factory.mktemp("memory")
    for name, layers, width in (("tiny", 2, 128), ("short", SHORT, WIDTH), ("large", LAYERS, WIDTH)):
        total = write_mixtral(made / name, layers=layers, width=width, seed=0)
        write_mixtral(made / f"{name}-other", layers=layers, width=width, seed=1)
    assert total >= 4 * BUDGET
    for seed, task in ((3, "low"), (4, "high")):
        ids = torch.randint(2, 128, (28, 16), generator=torch.Generator().manual_seed(seed))
        save_file({"input_ids": ids}, made / f"{task}.safetensors")
    return made


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """What the child says of each run; the verb with its budget, as it was asked."""
    asked = [f"prune={BUDGET}", f"inspect={BUDGET}", f"evaluate={BUDGET}", "prune=9000000", "merge=9000000"]
    asked += [f"{verb}={budget}" for verb, budget in SOLVING.items()]
    # Large blocks come from mmap and go back at once: glibc's own heaps would count with the pieces freed in them.
    quiet = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 18)}
    child = Path(__file__).with_name("memory_child.py")
    done = subprocess.run(
        [sys.executable, str(child), str(folder), *asked],
        capture_output=True, text=True, timeout=600, env={**os.environ, **quiet}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(
    ("verb", "budget"), [("prune", BUDGET), ("inspect", BUDGET), ("evaluate", BUDGET), *SOLVING.items()]
)
def test_a_verb_keeps_to_its_budget(verb: str, budget: int, runs: dict[str, dict[str, Any]]) -> None:
    found = runs[f"{verb}={budget}"]
    assert "failed" not in found, found
    assert "refused" not in found, found
    assert found["made"] == (verb not in ("inspect", "evaluate"))
    assert found["peak"] <= 1.1 * budget, found
    assert found["dry"].get("peak", 0) <= 1.1 * budget, found
    assert not {"failed", "refused"} & found["dry"].keys(), found


@pytest.mark.parametrize("verb", ["prune", "merge"])
def test_too_small_a_budget_is_refused_before_anything_is_made(verb: str, runs: dict[str, dict[str, Any]]) -> None:
    found = runs[f"{verb}=9000000"]
    assert "memory budget 9.00 MB is too small" in found["refused"]
    assert "need " in found["refused"]
    assert "\n" not in found["refused"]
    assert not found["made"]


VERBS: dict[str, Callable[..., Any]] = {
    "prune": lambda m, out, how: prune_experts(m.model, out, PruneOptions(keep=4), m.text(), CPU, how),
    "merge": lambda m, out, how: merge_experts(m.model, out, MergeOptions(to=4), m.text(), CPU, how),
    "quantize": lambda m, out, how: quantize(m.model, out, QuantizeOptions(group_size=8), m.text(), CPU, how),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_says_how_many_bytes_will_be_written(verb: str, tmp_path: Path) -> None:
    material, out = Material.make(tmp_path), tmp_path / "out"
    planned = VERBS[verb](material, out, Writing(dry_run=True))
    assert not out.exists()
    VERBS[verb](material, out, Writing(verify=False))
    with safe_open(out / "model.safetensors", framework="pt") as stored:
        written = sum(stored.get_tensor(name).nbytes for name in stored.keys())  # noqa: SIM118 - not a mapping
    assert planned.after["bytes"] == pytest.approx(written, rel=0.02)
