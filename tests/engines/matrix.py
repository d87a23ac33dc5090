"""Runs what moetools writes in the engines of this machine and writes docs/engines.md.

    python tests/engines/matrix.py --engine transformers --engine moetools.hf \
        --engine llama.cpp=LLAMA/bin/python --engine mlx=MLX/bin/python [--engine vllm=VLLM/bin/python]

Tiny random float32 checkpoints of every family below, one of every kind of output, `moetools.serve_check` in each
engine. README.md beside this file says how to make the environments. `--family` and `--kind` choose, `--to -` prints.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "formats")]

import torch
import transformers
from families import make_tiny
from safetensors.torch import save_file
from test_gguf import with_tokenizer

import moetools
from moetools.errors import GateError, MoetoolsError
from moetools.verbs.serve.report import EngineResult

WIDE = {
    "hidden_size": 64,
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
    "mlx 4 bits": ("`quantize --scheme w4a16 --format mlx`", quantized(scheme="w4a16", format="mlx")),
    "mlx mxfp4": ("`quantize --scheme mxfp4 --format mlx`", quantized(scheme="mxfp4", format="mlx", group_size=None)),
}
_FOR = {"gguf 8 bits": "llama.cpp", "gguf 4 bits": "llama.cpp", "mlx 4 bits": "mlx", "mlx mxfp4": "mlx"}
"""Outputs that are made for one engine; the folder around them is as for the others and is tried once."""
_SLOW = {"vllm": ("pruned",), "sglang": ("pruned", "w4a16", "fp8")}
"""Kinds an engine is tried with; vLLM's CPU build has no kernel for packed experts without AMX."""


class Notes:
    """Reasons, each once, by number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> str:
        text = " ".join(text.split())
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"


def cell(one: EngineResult, notes: Notes) -> str:
    if one.verdict == "agrees":
        return f"{one.mean:.0e}" if one.mean else "0"
    if one.verdict == "differs":
        return f"**differs by {one.mean:.1e}** ({one.share:.0%})"
    words = "refused" if one.verdict == "refused" else "fails"
    return f"{words} {notes(one.said[:200])}"


def row(
    model: Path, kind: str, text: Path, folder: Path, engines: list[str], notes: Notes, versions: dict[str, str]
) -> list[str]:
    """The cells of one output; `versions` of the engines that ran are noted down."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        KINDS[kind][1](model, out, text)
    except MoetoolsError as error:
        return [f"not written {notes(error.message.replace(str(model), 'MODEL'))}"] + [""] * (len(engines) - 1)
    cells = []
    for engine in engines:
        name = engine.partition("=")[0]
        if _FOR.get(kind, name) != name or kind not in _SLOW.get(name, KINDS):
            cells.append("")
            continue
        try:
            report = moetools.serve_check(out, engine=[engine], **CPU)
        except GateError as missed:
            report = missed.result
        found = report.engines[0]
        versions[engine] = found.version or versions.get(engine, "")
        cells.append(cell(found, notes))
    return cells


def main() -> None:
    """Print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", required=True, metavar="NAME[=PYTHON]")
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--to", default=str(HERE.parents[1] / "docs/engines.md"), help="file, or - to print")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kinds, notes = chosen.kind or list(KINDS), Notes()
    rows, versions = [], dict.fromkeys(chosen.engine, "")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = folder / "text.safetensors"
        save_file({"input_ids": torch.randint(2, 128, (40, 32), generator=torch.Generator().manual_seed(0))}, text)
        for family in chosen.family or FAMILIES:
            plain = make_tiny(family, folder / family, dtype=torch.float32, **{**WIDE, **FAMILIES[family]})
            model = with_tokenizer(plain, folder / f"{family}-model")
            for kind in kinds:
                cells = row(model, kind, text, folder, chosen.engine, notes, versions)
                rows.append([family, kind, *cells])
                sys.stderr.write(" | ".join(rows[-1]) + "\n")
    page = written(rows, chosen.engine, kinds, versions, notes)
    sys.stdout.write(page) if chosen.to == "-" else Path(chosen.to).write_text(page)


def written(rows: list[list[str]], engines: list[str], kinds: list[str], versions: dict[str, str], notes: Notes) -> str:
    """The page."""
    names = [f"{engine.partition('=')[0]} {versions[engine]}" for engine in engines]
    lines = [(HERE / "page.md").read_text().rstrip(), ""]
    lines += [f"- {kind}: {KINDS[kind][0]}" for kind in kinds]
    lines += ["", "| family | output | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    lines += ["| " + " | ".join(one) + " |" for one in rows]
    lines += [""] + [f"[{number}] {text}  " for number, text in enumerate(notes.texts, 1)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
