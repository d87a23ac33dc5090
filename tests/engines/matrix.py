"""Runs what moetools writes in the engines of this machine and writes docs/engines.md.

    python tests/engines/matrix.py --engine transformers --engine moetools.hf \
        --engine llama.cpp=LLAMA/bin/python --engine mlx=MLX/bin/python [--engine vllm=VLLM/bin/python]

Tiny random float32 checkpoints of every family below, one of every kind of output, `moetools.serve_check` in each
engine. README.md beside this file says how to make the environments. `--family` and `--kind` choose; results of other
runs are kept in results.json.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE.parents[1] / "docs/engines.md"
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "formats")]

import torch
import transformers
from families import FAMILIES as TINY
from families import make_tiny
from mtp_models import QWEN3_NEXT
from safetensors.torch import save_file
from test_gguf import with_tokenizer

import moetools
from moetools.errors import GateError, MoetoolsError
from moetools.verbs.serve.engines import ENGINES
from moetools.verbs.serve.report import EngineResult

WIDE = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "olmoe": {"num_key_value_heads": 4},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {},
    "deepseek_v3": {"kv_lora_rank": 32, "q_lora_rank": 32},
    "glm4_moe": {"n_group": 1, "topk_group": 1},
    "dots1": {"n_group": 1, "topk_group": 1},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "ernie4_5_moe": {},
    "granitemoe": {},
    "minimax_m2": {},
    "gpt_oss": {},
    "qwen3_next": {"num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
CPU = {"device": "cpu"}
RTN = {"method": "rtn", "group_size": 32, "verify": False, **CPU}


def pruned(model: Path, out: Path, _: Path) -> None:
    moetools.prune_experts(model, out, keep=4, method="random", **CPU)


def quantized(**options: Any) -> Callable[[Path, Path, Path], None]:
    def make(model: Path, out: Path, _: Path) -> None:
        moetools.quantize(model, out, **{**RTN, **options})

    return make


def dense(model: Path, out: Path, text: Path) -> None:
    moetools.distill(model, out, data=f"code={text}", seq_len=32, **CPU)


KINDS: dict[str, tuple[str, Callable[[Path, Path, Path], None]]] = {
    "pruned": ("`prune-experts --keep 4`", pruned),
    "dense": ("`distill`", dense),
    "w4a16": ("`quantize --scheme w4a16`", quantized(scheme="w4a16")),
    "fp8": ("`quantize --scheme fp8`", quantized(scheme="fp8", group_size=None)),
    "2 bits": ("`quantize --scheme w2a16`", quantized(scheme="w2a16", format="moetools")),
    "gguf 8 bits": ("`quantize --scheme w8a16 --format gguf`", quantized(scheme="w8a16", format="gguf")),
    "gguf 4 bits": ("`quantize --scheme w4a16 --format gguf`", quantized(scheme="w4a16", format="gguf")),
    "gguf mxfp4": (
        "`quantize --scheme mxfp4 --format gguf`",
        quantized(scheme="mxfp4", format="gguf", group_size=None),
    ),
    "mlx 4 bits": ("`quantize --scheme w4a16 --format mlx`", quantized(scheme="w4a16", format="mlx")),
    "mlx mxfp4": ("`quantize --scheme mxfp4 --format mlx`", quantized(scheme="mxfp4", format="mlx", group_size=None)),
}
_FOR = {"gguf 8 bits": "llama.cpp", "gguf 4 bits": "llama.cpp", "gguf mxfp4": "llama.cpp"}
_FOR |= {"mlx 4 bits": "mlx", "mlx mxfp4": "mlx"}
"""Outputs that are made for one engine; the folder around them is as for the others and is tried once."""
_SLOW = {"moetools.hf": ("2 bits",), "vllm": ("pruned",), "sglang": ("pruned", "w4a16", "fp8")}
"""Kinds an engine is tried with: moetools.hf loads the others as transformers does; vLLM's CPU build has no kernel for
packed experts without AMX."""


Results = dict[str, dict[str, dict[str, Any]]]
"""By family, by kind, by engine: what `serve-check` said; the engine "" says why the output was not written."""


def said(one: EngineResult) -> dict[str, Any]:
    """What is kept of a result."""
    return {
        "verdict": one.verdict,
        "version": one.version,
        "mean": one.mean,
        "share": one.share,
        "why": " ".join(one.said.split())[:200],
    }


def tried(model: Path, kind: str, text: Path, folder: Path, engines: list[str]) -> dict[str, dict[str, Any]]:
    """Write one output and try it."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        KINDS[kind][1](model, out, text)
    except MoetoolsError as error:
        return {"": {"why": error.message.replace(str(model), "MODEL")}}
    found = {}
    for engine in engines:
        name = engine.partition("=")[0]
        if _FOR.get(kind, name) != name or kind not in _SLOW.get(name, KINDS):
            continue
        try:
            report = moetools.serve_check(out, engine=[engine], **CPU)
        except GateError as missed:
            report = missed.result
        found[name] = said(report.engines[0])
    return found


def main() -> None:
    """Run what was chosen, add it to the results, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", required=True, metavar="NAME[=PYTHON]")
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    TINY["qwen3_next"] = QWEN3_NEXT
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = folder / "text.safetensors"
        save_file({"input_ids": torch.randint(2, 128, (40, 32), generator=torch.Generator().manual_seed(0))}, text)
        for family in chosen.family or FAMILIES:
            plain = make_tiny(family, folder / family, dtype=torch.float32, **{**WIDE, **FAMILIES[family]})
            model = with_tokenizer(plain, folder / f"{family}-model")
            for kind in chosen.kind or KINDS:
                found = tried(model, kind, text, folder, chosen.engine)
                sys.stderr.write(f"{family}, {kind}: {json.dumps(found)}\n")
                cells = results.setdefault(family, {}).setdefault(kind, {})
                cells.pop("", None)
                cells.update(found)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


def page(results: Results) -> str:
    """The page of all results."""
    rows = [
        (family, kind, results[family][kind])
        for family in FAMILIES
        for kind in KINDS
        if kind in results.get(family, {})
    ]
    engines = [name for name in ENGINES if any(name in found for *_, found in rows)]
    versions = {
        name: next((one[name]["version"] for *_, one in rows if one.get(name, {}).get("version")), "")
        for name in engines
    }
    notes: list[str] = []
    lines = [(HERE / "page.md").read_text().rstrip(), ""]
    lines += [f"- {kind}: {command}" for kind, (command, _) in KINDS.items()]
    lines += ["", "| family | output | " + " | ".join(f"{name} {versions[name]}" for name in engines) + " |"]
    lines += ["|---" * (len(engines) + 2) + "|"]
    for family, kind, found in rows:
        cells = [cell(found[name], notes) if name in found else "" for name in engines]
        if "" in found:
            cells[0] = f"not written {note(found['']['why'], notes)}"
        lines.append(f"| {family} | {kind} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {text}" for number, text in enumerate(notes, 1))]
    return "\n".join(lines) + "\n"


def cell(one: dict[str, Any], notes: list[str]) -> str:
    """A difference in nats, or a word and the number of its reason."""
    if one["verdict"] == "agrees":
        return f"{one['mean']:.0e}" if one["mean"] else "0"
    if one["verdict"] == "differs":
        return f"differs by {one['mean']:.1e} ({one['share']:.0%})"
    return f"{one['verdict']} {note(one['why'], notes)}"


def note(text: str, notes: list[str]) -> str:
    """The number of a reason; every reason is listed once."""
    if text not in notes:
        notes.append(text)
    return f"({notes.index(text) + 1})"


if __name__ == "__main__":
    main()
