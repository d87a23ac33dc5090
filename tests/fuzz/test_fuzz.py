"""The quick part of the fuzz suite: some hostile inputs of every kind, and all that once failed (`corpus`).

`python tests/fuzz/long_run.py --count 10000` is the long part.
"""

import contextlib
import json
import math
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinds import FEW, KINDS, linked, load_with_hf, make_bases, replace
from mutations import join_safetensors, split_safetensors
from outcome import outcome
from safetensors.torch import load_file, save_file

CORPUS = Path(__file__).parent / "corpus"
EXAMPLES = 7
ENTROPY = struct.Struct("<3sBBBBBIIHhIff")
ENTROPY_FIELDS = (
    "magic", "levels", "tables", "highest", "exponent_bits", "length_bits", "rows", "columns", "lane_rows",
    "least_exponent", "least_length", "step", "rate",
)  # fmt: skip
CHUNKS = struct.Struct("<3sBBBBBIIIhxxff")
CHUNKS_FIELDS = (
    "magic", "levels", "tables", "highest", "exponent_bits", "lanes", "rows", "columns", "steps", "least_exponent",
    "step", "rate",
)  # fmt: skip
INTEGER = struct.Struct("<BBBBIIII")
INTEGER_FIELDS = ("version", "bits", "flags", "scale", "rows", "columns", "group_size", "last")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bases(tmp_path_factory.mktemp("fuzz"))


def corpus(name: str) -> list[Any]:
    return json.loads((CORPUS / f"{name}.json").read_text())


def changed_model(base: Path, folder: Path, file: str, changes: dict[str, Any]) -> Path:
    model = linked(base, folder / "model")
    document = json.loads((model / file).read_text()) | changes
    replace(model / file, json.dumps(document).encode())
    return model


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_accepted_or_refused_in_one_line(
    kind: str, bases: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=HealthCheck)
    @given(st.integers(0, 2**32))
    def attack(seed: int) -> None:
        folder = tmp_path_factory.mktemp("input")
        with contextlib.chdir(folder):
            ending, words = outcome(KINDS[kind](random.Random(seed), bases, folder))
        assert ending in ("accepted", "refused"), f"{ending}: {words}"
        if ending == "refused" and words.startswith("error:"):
            assert words.count("\n") == 1 + words.count("\nhint:"), words

    attack()


@pytest.mark.parametrize("number", range(len(corpus("configs"))))
def test_configs_that_once_failed(number: int, bases: Path, tmp_path: Path) -> None:
    model = changed_model(bases / "model", tmp_path, "config.json", corpus("configs")[number])
    data = ["--data", str(bases / "ids0.safetensors"), *FEW]
    ending, words = outcome(["inspect-routing", str(model), *data], seconds=5)
    assert ending == "refused", words
    assert outcome(["inspect", str(model)], seconds=5)[0] in ("accepted", "refused")


@pytest.mark.parametrize("number", range(len(corpus("tokenizers"))))
def test_tokenizers_that_once_failed(number: int, bases: Path, tmp_path: Path) -> None:
    file, changes = corpus("tokenizers")[number]
    model = changed_model(bases / "model", tmp_path, file, changes)
    ending, words = outcome(["inspect-routing", str(model), "--data", str(bases / "text.jsonl"), *FEW], seconds=10)
    assert ending in ("refused", "accepted"), words


def with_stream(base: Path, folder: Path, suffix: str, change: Any) -> tuple[Path, str]:
    """A packed model whose first stream is changed, and that stream's name."""
    model = linked(base, folder / "model")
    tensors = load_file(base / "model.safetensors")
    name = min(one for one in tensors if one.endswith(suffix))
    tensors[name] = torch.frombuffer(bytearray(change(bytes(tensors[name].numpy()))), dtype=torch.uint8)
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model, name


def with_fields(layout: struct.Struct, names: tuple[str, ...], raw: bytes, changes: dict[str, Any]) -> bytes:
    fields = dict(zip(names, layout.unpack_from(raw), strict=True)) | changes
    return layout.pack(*(float(value) if isinstance(value, str) else value for value in fields.values()))


CODED = [("moetools-lanes", "entropy_headers", ENTROPY, ENTROPY_FIELDS)]
CODED += [("moetools-entropy", "chunk_headers", CHUNKS, CHUNKS_FIELDS)]


@pytest.mark.parametrize(
    ("base", "file", "layout", "fields", "number"),
    [(*layout, number) for layout in CODED for number in range(len(corpus(layout[1])))],
)
def test_entropy_headers_that_once_failed(
    base: str, file: str, layout: struct.Struct, fields: tuple[str, ...], number: int, bases: Path, tmp_path: Path
) -> None:
    def change(raw: bytes) -> bytes:
        start = with_fields(layout, fields, raw, corpus(file)[number])
        body = raw[layout.size + 4 :]
        return start + zlib.crc32(body, zlib.crc32(start)).to_bytes(4, "little") + body

    model, name = with_stream(bases / base, tmp_path, "_entropy", change)
    ending, words = outcome(["quantize", "--expand", str(model), str(tmp_path / "out"), "--quiet"], seconds=5)
    assert ending == "refused"
    assert name.removesuffix("_entropy") in words
    assert outcome(lambda: load_with_hf(model), seconds=5)[0] == "refused"


@pytest.mark.parametrize("number", range(len(corpus("integer_headers"))))
def test_integer_headers_that_once_failed(number: int, bases: Path, tmp_path: Path) -> None:
    def change(raw: bytes) -> bytes:
        start = with_fields(INTEGER, INTEGER_FIELDS, raw[4:], corpus("integer_headers")[number])
        whole = start + raw[4 + INTEGER.size :]
        return zlib.crc32(whole).to_bytes(4, "little") + whole

    model, name = with_stream(bases / "moetools-integer", tmp_path, "_integer", change)
    ending, words = outcome(["quantize", "--expand", str(model), str(tmp_path / "out"), "--quiet"], seconds=5)
    assert ending == "refused"
    assert name.removesuffix("_integer") in words


@pytest.mark.parametrize("number", range(len(corpus("task_routings"))))
def test_task_routings_that_once_failed(number: int, bases: Path, tmp_path: Path) -> None:
    from moetools.routing.task_routing import load_task_routing

    document = json.loads((bases / "routed" / "task_routing.json").read_text())
    (tmp_path / "task_routing.json").write_text(json.dumps(document | corpus("task_routings")[number]))
    ending, words = outcome(lambda: load_task_routing(tmp_path))
    assert ending == "refused"
    assert "task_routing.json" in words


@pytest.mark.parametrize("name", corpus("names"), ids=ascii)
def test_names_that_once_failed(name: str, bases: Path, tmp_path: Path) -> None:
    values = [f"{name}={bases / 'ids0.safetensors'}", f"b={bases / 'ids1.safetensors'}"]
    data = [word for value in values for word in ("--data", value)]
    ending, words = outcome(["route-tasks", str(bases / "model"), str(tmp_path / "out"), *data, "--keep", "3", *FEW])
    assert ending == "refused", words
    assert "no such data" not in words or "/" in name


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_counts_that_no_measurement_gives_are_refused(value: float, bases: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(bases / "stats.safetensors", "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(bases / "stats.safetensors")
    name = "0.load.slots" if value < 0 else "0.router.probability"
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, tmp_path / "stats.safetensors", metadata)
    words = ["inspect-routing", str(bases / "model"), "--stats", str(tmp_path / "stats.safetensors")]
    ending, said = outcome([*words, "--quiet"])
    assert ending == "refused"
    assert name.split(".")[1] in said


@pytest.mark.parametrize("shape", [(10**9, 0, 1), (2**62, 0), (0,), (1,) * 64])
def test_shapes_without_bytes_cost_nothing(shape: tuple[int, ...], bases: Path, tmp_path: Path) -> None:
    model = linked(bases / "model", tmp_path / "model")
    header, data = split_safetensors(bases / "model" / "model.safetensors")
    end, nbytes = len(data), 4 * math.prod(shape)
    entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + nbytes]}
    header["model.layers.0.mlp.experts.gate_up_proj"] = entry
    replace(model / "model.safetensors", join_safetensors(header, data + bytes(nbytes)))
    assert outcome(["inspect", str(model)], seconds=5)[0] == ("accepted" if len(shape) == 1 else "refused")
    ids = str(bases / "ids0.safetensors")
    assert outcome(["inspect-routing", str(model), "--data", ids, *FEW], seconds=5)[0] in ("accepted", "refused")
