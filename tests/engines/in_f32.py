"""Where a packed GGUF differs in llama.cpp: as written, and the same weights as F32, against moetools' own logits.

    python tests/engines/in_f32.py ~/llama/bin/python 'gguf mxfp4' mixtral gpt_oss
    ALL_EXPERTS=1 python tests/engines/in_f32.py ...      # every token uses all, so that rounding cannot reroute

If the second agrees and the first does not, the weights are right, and llama.cpp's rounding of activations to 8 bits in
front of packed weights is what differs.
"""

import os
import sys
import tempfile
from pathlib import Path

import gguf
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "formats")]

from families import FAMILIES as TINY
from families import make_tiny
from matrix import FAMILIES, KINDS, WIDE
from mtp_models import QWEN3_NEXT
from test_gguf import with_tokenizer

import moetools
from moetools.errors import GateError
from moetools.verbs.serve.report import EngineResult


def checked(out: Path, python: str) -> EngineResult:
    """What llama.cpp makes of it."""
    try:
        return moetools.serve_check(out, engine=[f"llama.cpp={python}"], device="cpu").engines[0]
    except GateError as missed:
        return missed.result.engines[0]


def to_f32(path: Path) -> None:
    """Replace every tensor by what gguf-py decodes it to."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".f32"), reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".f32").replace(path)


def all_experts(family: str) -> dict[str, int]:
    """What makes every token use all of them."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next(TINY[family][key] for key in keys if key in TINY[family])
    groups = {"n_group": 1, "topk_group": 1} if "n_group" in TINY[family] else {}
    return {"num_experts_per_tok": count, **groups}


def main(python: str, kind: str, *families: str) -> None:
    """One line per family."""
    torch.set_num_threads(1)
    TINY["qwen3_next"] = QWEN3_NEXT
    for family in families or FAMILIES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            sizes = {**WIDE, **FAMILIES[family], **(all_experts(family) if os.environ.get("ALL_EXPERTS") else {})}
            plain = make_tiny(family, folder / family, dtype=torch.float32, **sizes)
            out = folder / "out"
            KINDS[kind][1](with_tokenizer(plain, folder / f"{family}-model"), out, folder)
            written = checked(out, python)
            to_f32(next(out.glob("*.gguf")))
            exact = checked(out, python)
            shares = [f"{one.verdict} {one.share or 0:.2%} ({one.mean or 0:.1e} nats)" for one in (written, exact)]
            sys.stdout.write(f"{family}: as written {shares[0]}, in F32 {shares[1]}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
