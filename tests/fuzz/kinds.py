"""Kinds of hostile input: each makes a folder with one damaged thing in it and says which command reads it.

`make_bases` writes the good files once. A kind is a function of a random generator, the good files and an empty folder;
it returns what to run: the words of a command line, or a function that must end well or with a `MoetoolsError`.
"""

import json
import os
import random
import shutil
import struct
import sys
import traceback
import zlib
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers.dynamic_module_utils
import yaml
from mutations import (
    mutated_bytes,
    mutated_document,
    mutated_json_text,
    mutated_safetensors,
    split_safetensors,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "formats"))

import lanes_writer

import moetools.demo
from moetools.checkpoint.reader import open_checkpoint
from moetools.cli.app import run
from moetools.errors import UserError
from moetools.formats.base import load_format
from moetools.grids.base import make_grid
from moetools.verbs.compress.building import Measurements

Action = Sequence[str] | Callable[[], object]
Kind = Callable[[random.Random, Path, Path], Action]

MODEL = {
    "vocab_size": 2048, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "intermediate_size": 64, "max_position_embeddings": 128, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
CONFIG_KEYS = (
    "attn_implementation", "_attn_implementation", "experts_implementation", "auto_map", "text_config", "layer_types",
    "head_dim", "rope_scaling", "rope_parameters", "quantization_config", "sliding_window", "use_sliding_window",
    "num_local_experts", "n_routed_experts", "n_group", "topk_group", "num_nextn_predict_layers", "dtype",
    "torch_dtype", "moetools_experts_per_layer", "model_type", "architectures", "return_dict", "output_attentions",
    "tokenizer_class",
    "first_k_dense_replace", "num_hidden_layers", "num_experts", "num_attention_heads", "hidden_size", "hidden_act",
)  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "moetools-integer": {"kind": "integer", "bits": 3, "group_size": 8},
    "moetools-zero": {"kind": "integer", "bits": 4, "group_size": 8, "symmetric": False},
    "moetools-ternary": {"kind": "integer", "bits": 2, "ternary": True},
    "moetools-entropy": {"kind": "entropy", "rate": 6.0},
    "moetools-lanes": {"kind": "entropy", "rate": 6.0},
    "pack-quantized": {"kind": "integer", "bits": 4, "group_size": 8},
    "int-quantized": {"kind": "integer", "bits": 8},
    "float-quantized": {"kind": "float8"},
    "mxfp4": {"kind": "mxfp4", "group_size": 32},
    "nvfp4": {"kind": "nvfp4", "group_size": 16},
    "fp8": {"kind": "float8_block", "group_size": 128},
}
HOSTILE_YAML = (
    b"a: " * 3_000, b"[" * 50_000, b"{" * 5_000, b"? " * 5_000, b"- " * 5_000, b"9" * 6_000, b"out: 2026-99-99",
    b"out: 0x" + b"f" * 5_000, b"a: &a [*a]\nsteps: *a", b"&a [*a, *a]", b"steps: !!python/object/apply:os.system [ls]",
    b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9))
                                              for n in range(9)) + b"steps: *j",
    b"a: 1\n---\nb: 2", b"\xff\xfe", b"%YAML 9.9\n---\na: 1", b"<<: 5", b"out: !!binary ===", b"1:60:60.5e999: x",
    b"\ta: 1", b"out: \"\\ud800\"", b"? [a]\n: b", b"? {a: b}\n: c", b".inf: 1\n.nan: 2", b"null: null",
)  # fmt: skip
"""Nesting without end, impossible values, tags that name code, and the expansion of one alias in others."""
_NOTHING: Any = None
FEW = ("--seq-len", "16", "--samples", "2", "--device", "cpu", "--quiet")


def make_bases(folder: Path) -> Path:
    """The good files: a tiny model with a tokenizer, packed copies, statistics, a task routing, texts, token ids."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **MODEL), dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    demo = Path(moetools.demo.__file__).parent / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / "model" / name)
    generator = torch.Generator().manual_seed(1)
    for number in range(2):
        ids = torch.randint(2, 2048, (8, 16), generator=generator)
        save_file({"input_ids": ids}, folder / f"ids{number}.safetensors")
    line = "The quick brown fox jumps over the lazy dog and then goes back to the wood where it lives. "
    texts = [{"text": f"{number} {line}" * 4} for number in range(6)]
    (folder / "text.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    message = {"messages": [{"role": "user", "content": line}, {"role": "assistant", "content": "Yes."}]}
    pair = {"prompt": line, "completion": line}
    (folder / "chat.jsonl").write_text(json.dumps(message) + "\n" + json.dumps(pair) + "\n")
    item = {"prompt": "The fox", "choices": [" jumps", " sleeps"], "answer": 0}
    (folder / "choices.jsonl").write_text((json.dumps(item) + "\n") * 2)
    _make_packed(folder)
    _command("inspect-routing", folder / "model", "--data", folder / "ids0.safetensors",
             "--save-stats", folder / "stats.safetensors", *FEW)  # fmt: skip
    _command("route-tasks", folder / "model", folder / "routed", "--data", f"a={folder / 'ids0.safetensors'}", "--data",
             f"b={folder / 'ids1.safetensors'}", "--keep", "3", "--seq-len", "16", "--device", "cpu", "--no-report",
             "--quiet")  # fmt: skip
    chain = {
        "variables": {"out": None},
        "out": "${out}",
        "steps": [
            {"name": "pruned", "verb": "prune-experts", "model": str(folder / "model"),
             "options": {"experts": "0,1,2", "verify": False, "device": "cpu"}},
            {"name": "packed", "verb": "quantize", "model": "${pruned}",
             "options": {"method": "rtn", "scheme": "w4a16", "group_size": 8, "verify": False, "device": "cpu"}},
        ],
    }  # fmt: skip
    (folder / "chain.yaml").write_text(yaml.safe_dump(chain, sort_keys=False))
    _command(*_chain(folder, folder / "chain"), "--quiet")
    return folder


def _make_packed(folder: Path) -> None:
    for name, description in LAYOUTS.items():
        out = folder / name
        shutil.copytree(folder / "model", out)
        if name == "fp8":
            wide = {"model.layers.0.self_attn.wide.weight": torch.randn(128, 128)}
            save_file({**load_file(out / "model.safetensors"), **wide}, out / "model.safetensors", {"format": "pt"})
        source = open_checkpoint(shutil.copytree(out, folder / "scratch", dirs_exist_ok=True))
        layout, grid = load_format(name.split("-")[0] if name.startswith("moetools") else name), make_grid(description)
        packed, grids = {}, {}
        for key, tensor in load_file(source.path / "model.safetensors").items():
            chosen = "wide" in key if name == "fp8" else ".experts." in key or "o_proj" in key
            if chosen and key.endswith("weight"):
                quantized = grid.quantize(tensor.float()[None])
                older = name == "moetools-lanes"
                packed |= lanes_writer.pack(key, quantized) if older else layout.pack(key, quantized, tensor.dtype)
                grids[key] = grid
            else:
                packed[key] = tensor
        save_file(packed, out / "model.safetensors", {"format": "pt"})
        config = source.config | {"quantization_config": layout.config(grids, source)}
        (out / "config.json").write_text(json.dumps(config))


def _command(*words: object) -> None:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run([str(word) for word in words])
    if code:
        raise RuntimeError(f"{words}: {code}: {err.getvalue()}")


def linked(source: Path, folder: Path) -> Path:
    """A copy of a model folder whose files are links; damage replaces one of them."""
    folder.mkdir()
    for file in source.iterdir():
        if file.is_file():
            os.link(file, folder / file.name)
    return folder


def replace(file: Path, data: bytes) -> None:
    """Write `file` anew, without touching what it is a link to."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def reading_verb(rng: random.Random, model: Path, bases: Path) -> list[str]:
    """A command that reads a model; mostly the cheapest."""
    text = ["--data", str(bases / "ids0.safetensors")]
    words: tuple[Sequence[str], ...] = (
        ["inspect", str(model)],
        ["inspect-routing", str(model), *text, *FEW],
        ["evaluate", str(model), *text, *FEW],
        ["prune-experts", str(model), str(model.parent / "out"), "--keep", "3", "--method", "frequency", *text, *FEW],
        ["quantize", str(model), str(model.parent / "out"), "--scheme", "w4a16", "--group-size", "8", "--method", "rtn",
         "--target", "transformers", "--device", "cpu", "--quiet"],
        ["distill", str(model), str(model.parent / "out"), "--dry-run", "--width", "32", *text, *FEW],
    )  # fmt: skip
    return list(words[rng.choice((0, 0, 0, 0, 1, 1, 2, 3, 4, 5))])


def config(rng: random.Random, bases: Path, folder: Path) -> Action:
    model = linked(bases / "model", folder / "model")
    document = json.loads((model / "config.json").read_text())
    if rng.random() < 0.15:
        document = {**document, "text_config": document}
    replace(model / "config.json", mutated_json_text(rng, document, CONFIG_KEYS))
    return reading_verb(rng, model, bases)


def index(rng: random.Random, bases: Path, folder: Path) -> Action:
    model = linked(bases / "model", folder / "model")
    shard = "model-00001-of-00001.safetensors"
    (model / "model.safetensors").rename(model / shard)
    names = [name for name in split_safetensors(model / shard)[0] if name != "__metadata__"]
    document = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    (model / "model.safetensors.index.json").write_bytes(mutated_json_text(rng, document))
    return reading_verb(rng, model, bases)


def header(rng: random.Random, bases: Path, folder: Path) -> Action:
    model = linked(bases / "model", folder / "model")
    replace(model / "model.safetensors", mutated_safetensors(rng, bases / "model" / "model.safetensors"))
    return reading_verb(rng, model, bases)


def tokenizer(rng: random.Random, bases: Path, folder: Path) -> Action:
    model = linked(bases / "model", folder / "model")
    name = rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    document = json.loads((model / name).read_text())
    if name == "tokenizer.json" and rng.random() < 0.7:
        # The vocabulary is so large that hardly anything else would be hit.
        part = {key: value for key, value in document.items() if key != "model"}
        part["model"] = {key: value for key, value in document["model"].items() if key not in ("vocab", "merges")}
        keys = ("padding", "truncation", "normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")
        part = mutated_document(rng, part, keys)
        if isinstance(part, dict) and isinstance(part.get("model"), dict):
            part["model"] = {**{key: document["model"][key] for key in ("vocab", "merges")}, **part["model"]}
        replace(model / name, json.dumps(part).encode())
    else:
        keys = ("tokenizer_class", "auto_map", "chat_template", "model_max_length", "added_tokens_decoder", "pad_token")
        replace(model / name, mutated_json_text(rng, document, keys))
    data = bases / rng.choice(("text.jsonl", "text.jsonl", "chat.jsonl"))
    return ["inspect-routing", str(model), "--data", str(data), *FEW]


def statistics(rng: random.Random, bases: Path, folder: Path) -> Action:
    file = folder / "stats.safetensors"
    if rng.random() < 0.3:
        file.write_bytes(mutated_safetensors(rng, bases / file.name))
    else:
        metadata = dict(split_safetensors(bases / file.name)[0]["__metadata__"])
        tensors = load_file(bases / file.name)
        if rng.random() < 0.4:
            key = rng.choice(("provenance", "shape"))
            metadata[key] = mutated_json_text(rng, json.loads(metadata[key])).decode("utf-8", "replace")
        else:
            key = rng.choice(sorted(tensors))
            tensors = _damaged_tensor(rng, tensors, key)
        save_file(tensors, file, {key: str(value) for key, value in metadata.items()})
    model = str(bases / "model")
    if rng.random() < 0.7:
        return ["inspect-routing", model, "--stats", str(file), "--quiet", "--device", "cpu"]
    return ["prune-experts", model, str(folder / "out"), "--keep", "3", "--method", "frequency", "--stats", str(file),
            "--quiet", "--device", "cpu", "--no-verify"]  # fmt: skip


def _damaged_tensor(rng: random.Random, tensors: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    tensor = tensors.pop(key)
    kind = rng.randrange(8)
    if kind == 0:
        return tensors
    if kind == 1:
        return {**tensors, rng.choice((f"{key}.x", "a.b", f"9{key}", "-1.load.counts", "x" * 300, "")): tensor}
    changed = {
        2: lambda: tensor.double().fill_(float("nan")),
        3: lambda: (-tensor.double() - 1).to(tensor.dtype),
        4: lambda: tensor.reshape(-1),
        5: lambda: tensor.reshape(-1)[:1].clone(),
        6: lambda: torch.zeros((10**6, 0)),
        7: lambda: tensor.to(rng.choice((torch.float16, torch.int8, torch.bool, torch.complex64, torch.float64))),
    }[kind]()
    return {**tensors, key: changed}


def task_routing(rng: random.Random, bases: Path, folder: Path) -> Action:
    import moetools.hf  # noqa: F401

    for file in (bases / "routed").iterdir():
        if file.is_file():
            os.link(file, folder / file.name)
    document = json.loads((folder / "task_routing.json").read_text())
    keys = ("routers", "refitted", "sentence_end_ids", "model", "tasks")
    replace(folder / "task_routing.json", mutated_json_text(rng, document, keys))
    classifier = folder / "task_classifier.safetensors"
    if classifier.exists() and rng.random() < 0.3:
        replace(classifier, mutated_safetensors(rng, bases / "routed" / classifier.name))

    def load() -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(bases / "model")
        model.load_task_routing(folder)
        model.set_task("a")
        model(input_ids=torch.arange(8)[None])

    return load


def packed_config(rng: random.Random, bases: Path, folder: Path) -> Action:
    model = linked(bases / rng.choice(sorted(LAYOUTS)), folder / "model")
    document = json.loads((model / "config.json").read_text())
    document["quantization_config"] = mutated_document(
        rng, document["quantization_config"], ("version", "groups", "format")
    )
    replace(model / "config.json", json.dumps(document).encode())
    return _packed_action(rng, model, bases)


def packed_parts(rng: random.Random, bases: Path, folder: Path) -> Action:
    name = rng.choice(sorted(LAYOUTS))
    model = linked(bases / name, folder / "model")
    tensors = load_file(bases / name / "model.safetensors")
    plain = split_safetensors(bases / "model" / "model.safetensors")[0]
    key = rng.choice(sorted(set(tensors) - set(plain)) or sorted(tensors))
    (model / "model.safetensors").unlink()
    save_file(_damaged_tensor(rng, tensors, key), model / "model.safetensors", {"format": "pt"})
    return _packed_action(rng, model, bases)


def payload(rng: random.Random, bases: Path, folder: Path) -> Action:
    """Streams of moetools' own format whose checksums are right and whose headers or bodies are not."""
    coded = ("moetools-entropy", "moetools-entropy", "moetools-lanes")
    name = rng.choice((*coded, "moetools-integer", "moetools-zero", "moetools-ternary"))
    model = linked(bases / name, folder / "model")
    tensors = load_file(bases / name / "model.safetensors")
    suffix = "_entropy" if name in coded else "_integer"
    key = rng.choice(sorted(one for one in tensors if one.endswith(suffix)))
    raw = bytes(tensors[key].numpy())
    damage = {"moetools-entropy": _damaged_chunks, "moetools-lanes": _damaged_lanes}.get(name, _damaged_integer)
    tensors[key] = torch.frombuffer(bytearray(damage(rng, raw)), dtype=torch.uint8)
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return _packed_action(rng, model, bases)


def _damaged_chunks(rng: random.Random, raw: bytes) -> bytes:
    """A header that lies, words and states that are others, or any bytes, under a checksum that is right."""
    layout = struct.Struct("<3sBBBBBIIIhxxff")
    fields, body = list(layout.unpack_from(raw)), bytearray(raw[layout.size + 4 :])
    limits = dict.fromkeys(range(1, 6), 255) | {6: 2**32 - 1, 7: 2**32 - 1, 8: 2**32 - 1, 9: 32767}
    kind = rng.random()
    if kind < 0.5:
        for _ in range(rng.choice((1, 1, 2))):
            place = rng.randrange(1, 12)
            if place > 9:
                fields[place] = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e-30, 1e30))
            else:
                near = (fields[place] + 1, fields[place] * 2, max(1, fields[place] // 2), fields[place] - 1)
                fields[place] = rng.choice((0, 1, limits[place], rng.randint(0, limits[place]), *near))
                fields[place] = max(0, min(fields[place], limits[place]))
    elif kind < 0.8:
        # Behind the tables: lengths, states and words, most of them still possible.
        for _ in range(rng.choice((1, 2, 50))):
            place = rng.randrange(len(body) // 2, len(body))
            body[place] = rng.choice((0, 1, 127, 255, body[place] ^ 1 << rng.randrange(8)))
    else:
        body = bytearray(mutated_bytes(rng, bytes(body)) or b"\0")
    start = layout.pack(*fields)
    return start + struct.pack("<I", zlib.crc32(body, zlib.crc32(start))) + bytes(body)


def _damaged_lanes(rng: random.Random, raw: bytes) -> bytes:
    layout = struct.Struct("<3sBBBBBIIHhIff")
    fields, body = list(layout.unpack_from(raw)), raw[layout.size + 4 :]
    limits = {1: 255, 2: 255, 3: 255, 4: 255, 5: 255, 6: 2**32 - 1, 7: 2**32 - 1, 8: 65535, 9: 32767, 10: 2**32 - 1}
    if rng.random() < 0.7:
        for _ in range(rng.choice((1, 1, 2))):
            place = rng.randrange(1, 13)
            if place > 10:
                fields[place] = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e-30, 1e30))
            else:
                fields[place] = rng.choice((0, 1, limits[place], rng.randint(0, limits[place]), fields[place] + 1))
                fields[place] = min(fields[place], limits[place])
    else:
        body = mutated_bytes(rng, body) or b"\0"
    start = layout.pack(*fields)
    return start + struct.pack("<I", zlib.crc32(body, zlib.crc32(start))) + body


def _damaged_integer(rng: random.Random, raw: bytes) -> bytes:
    layout = struct.Struct("<BBBBIIII")
    fields, body = list(layout.unpack_from(raw, 4)), raw[4 + layout.size :]
    if rng.random() < 0.7:
        place = rng.randrange(8)
        most = 255 if place < 4 else 2**32 - 1
        fields[place] = rng.choice((0, 1, 2, most, rng.randint(0, most), min(most, fields[place] + 1)))
    else:
        body = mutated_bytes(rng, body) or b"\0"
    whole = layout.pack(*fields) + body
    return zlib.crc32(whole).to_bytes(4, "little") + whole


def _packed_action(rng: random.Random, model: Path, bases: Path) -> Action:
    kind = rng.randrange(5)
    if kind == 0 and "moetools" in (model / "config.json").read_text():
        return lambda: load_with_hf(model)
    if kind <= 2:
        return ["quantize", "--expand", str(model), str(model.parent / "out"), "--quiet"]
    if kind == 3:
        return ["evaluate", str(model), "--data", str(bases / "ids0.safetensors"), *FEW]
    return ["inspect", str(model)]


def load_with_hf(model: Path) -> None:
    """What transformers refuses before it asks moetools is refused; what comes out of moetools must say it well."""
    import moetools.hf

    package = str(Path(moetools.hf.__file__).parents[1])
    try:
        AutoModelForCausalLM.from_pretrained(model)
        moetools.hf.load_packed(model, cache_bytes=5_000)(input_ids=torch.arange(8)[None])
    except Exception as error:
        if any(frame.filename.startswith(package) for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise UserError(f"transformers alone: {error}") from error


def data(rng: random.Random, bases: Path, folder: Path) -> Action:
    name = rng.choice(("text.jsonl", "chat.jsonl", "choices.jsonl", "ids0.safetensors", "text.txt", "text.parquet"))
    file = folder / name
    if name.endswith(".safetensors"):
        file.write_bytes(mutated_safetensors(rng, bases / name))
    elif name.endswith(".jsonl"):
        lines = [json.loads(line) for line in (bases / name).read_text().splitlines()]
        lines[rng.randrange(len(lines))] = mutated_document(rng, lines[0], ("text", "messages", "prompt", "completion"))
        text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        file.write_bytes(mutated_bytes(rng, text) if rng.random() < 0.3 else text)
    else:
        if name.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            column = rng.choice(("text", "messages", "other"))
            values = [rng.choice((None, "a few words of text " * 20, "\x00", "")) for _ in range(5)]
            pyarrow.parquet.write_table(pyarrow.table({column: values}), file)
            raw = file.read_bytes()
        else:
            encoding = rng.choice(("utf-8", "utf-16", "latin-1", "utf-8-sig"))
            raw = ("Größe und Café, a few words of text. " * 30).encode(encoding)
        file.write_bytes(mutated_bytes(rng, raw) if rng.random() < 0.5 else raw)
    if name == "choices.jsonl":
        return ["evaluate", str(bases / "model"), "--choices", str(file), "--device", "cpu", "--quiet"]
    return ["evaluate", str(bases / "model"), "--data", f"{rng.choice(('a', 'con', 'task'))}={file}", *FEW]


def record(rng: random.Random, bases: Path, folder: Path) -> Action:
    """moetools.json of an earlier output, beside a model that is read again or overwritten."""
    model = linked(bases / "moetools-integer", folder / "model")
    document = {"verb": "quantize", "command": "moetools quantize", "versions": {"moetools": "0"}, "seed": 0}
    (model / "moetools.json").write_bytes(mutated_json_text(rng, document))
    return reading_verb(rng, model, bases) if rng.random() < 0.5 else _packed_action(rng, model, bases)


def names(rng: random.Random, bases: Path, folder: Path) -> Action:
    """Task names, file names and model types with characters that terminals obey."""
    bad = rng.choice(
        ("\x1b[2J", "\x07", "\u202e", "<script>", "a" * 300, "con", "task_routing", "..", "a/b", "\x9b31m")
    )
    kind = rng.randrange(3)
    if kind == 0:
        model = linked(bases / "model", folder / "model")
        document = json.loads((model / "config.json").read_text()) | {"model_type": bad}
        replace(model / "config.json", json.dumps(document).encode())
        return reading_verb(rng, model, bases)
    value = f"{bad}={bases / 'ids0.safetensors'}" if kind == 1 else f"a={folder / bad}"
    return ["evaluate", str(bases / "model"), "--data", value, *FEW]


def custom_code(rng: random.Random, bases: Path, folder: Path) -> Action:
    """A model with Python code of its own, which the user trusts and which fails in some way."""
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(folder / "modules")
    model = linked(bases / "model", folder / "model")
    base = "from transformers import PreTrainedConfig\nclass Config(PreTrainedConfig):\n    model_type = 'own'\n"
    raising = "    def __init__(self, **kwargs):\n        raise {}\n"
    sources = (
        "raise RuntimeError('at import')", "def broken(:", "class Config: pass", "import sys; sys.exit(3)", base, "",
        *(base + raising.format(one) for one in ("ZeroDivisionError", "AssertionError", "KeyError(3)", "SystemExit")),
        base + "    num_hidden_layers = 'x'\n", "import no_such_module_anywhere\n" + base,
    )  # fmt: skip
    (model / "own.py").write_text(rng.choice(sources))
    names = ("own.Config", "own.Config", "own.Config", "own", "", "own.X", "../own.Config", 5, None, [], "a/b--own.C")
    document = json.loads((model / "config.json").read_text())
    document |= {"model_type": "own", "auto_map": {"AutoConfig": rng.choice(names), "AutoModelForCausalLM": "own.M"}}
    replace(model / "config.json", json.dumps(document).encode())
    trusted = ["--trust-remote-code"] if rng.random() < 0.8 else []
    return ["inspect-routing", str(model), "--data", str(bases / "ids0.safetensors"), *FEW, *trusted]


def recipe(rng: random.Random, bases: Path, folder: Path) -> Action:
    """A recipe of two steps and a report, damaged as YAML's data or as text."""
    document = {
        "about": "a chain",
        "variables": {"model": None, "out": None, "text": [str(bases / "ids0.safetensors")], "keep": 3},
        "out": "${out}",
        "options": {"verify": False, "device": "cpu"},
        "steps": [
            {"name": "pruned", "verb": "prune-experts", "model": "${model}", "keep": True,
             "options": {"keep": "${keep}", "method": "frequency", "data": "${text}", "seq_len": 16, "samples": 2}},
            {"name": "packed", "verb": "quantize", "model": "${pruned}",
             "options": {"method": "rtn", "scheme": "w4a16", "group_size": 8}},
        ],
        "report": {"reference": "${model}", "data": "${text}", "seq_len": 16, "samples": 2},
    }  # fmt: skip
    file = folder / "recipe.yaml"
    if rng.random() < 0.75:
        keys = ("name", "verb", "model", "out", "options", "variables", "report", "keep", "teacher", "overwrite", "set")
        text = yaml.safe_dump(mutated_document(rng, document, keys), sort_keys=False).encode("utf-8", "replace")
    else:
        text = yaml.safe_dump(document, sort_keys=False).encode()
    if rng.random() < 0.2:
        text = rng.choice((mutated_bytes(rng, text), *HOSTILE_YAML))
    file.write_bytes(text)
    given = [f"--set={name}={path}" for name, path in (("model", bases / "model"), ("out", folder / "out"))]
    return ["run", str(file), *given, "--quiet", *(["--dry-run"] if rng.random() < 0.6 else [])]


def run_record(rng: random.Random, bases: Path, folder: Path) -> Action:
    """What a run, or a compression, wrote down of what it has done."""
    if rng.random() < 0.25:
        file = folder / "probes.json"
        file.write_bytes(mutated_json_text(rng, {"settings": "a", "kl": {"none-4-8": 0.5, "prune-2-None": 1.5}}))
        return lambda: Measurements(file, "a", _NOTHING, _NOTHING)
    shutil.copytree(bases / "chain", folder / "chain")
    file = folder / "chain" / "moetools-run.json"
    keys = ("steps", "key", "done", "cleaned", "nbytes", "checkpoints", "report", "tables", "seconds")
    file.write_bytes(mutated_json_text(rng, json.loads(file.read_text()), keys))
    words = [*_chain(bases, folder / "chain"), "--quiet"]
    return [*words, "--dry-run"] if rng.random() < 0.4 else words


def _chain(bases: Path, out: Path) -> list[str]:
    return ["run", str(bases / "chain.yaml"), f"--set=out={out}"]


KINDS: dict[str, Kind] = {
    "config.json": config,
    "index": index,
    "header": header,
    "tokenizer": tokenizer,
    "statistics": statistics,
    "task_routing.json": task_routing,
    "packed config": packed_config,
    "packed parts": packed_parts,
    "payload": payload,
    "data": data,
    "moetools.json": record,
    "names": names,
    "custom code": custom_code,
    "recipe": recipe,
    "record of a run": run_record,
}
