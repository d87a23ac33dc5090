"""What opens, what is refused, and with which words."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_folders import DTYPES, random_bytes, same_bits, write_index, write_model, write_raw
from safetensors.torch import load_file, save_file

from moetools.checkpoint.headers import read_header
from moetools.checkpoint.reader import Checkpoint, natural_key, open_checkpoint
from moetools.errors import CheckpointError, MoetoolsError

ONE = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3)}
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def refused(folder: Path) -> MoetoolsError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in caught.value.message
    return caught.value


def sharded(folder: Path) -> Path:
    shards = {
        "model-00001-of-00002.safetensors": {"layers.10.w": torch.ones(3), "layers.9.w": torch.zeros(4)},
        "model-00002-of-00002.safetensors": {"layers.2.w": torch.full((2, 2), 7.0)},
    }
    return write_model(folder, shards, index=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (), (1,)], ids=str)
def test_reads_what_the_library_wrote(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = {"x": random_bytes(shape, dtype, seed=1), "y": random_bytes((7,), dtype, seed=2)}
    checkpoint = open_checkpoint(write_model(tmp_path, {"model.safetensors": tensors}))
    found = checkpoint.read(["y", "x"])
    assert list(found) == ["y", "x"]
    reference = load_file(tmp_path / "model.safetensors") if dtype != torch.float8_e8m0fnu else tensors
    assert all(same_bits(found[name], reference[name]) for name in tensors)
    assert checkpoint.tensors["x"].shape == shape
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_reads_packed_4_bit_floats(tmp_path: Path) -> None:
    packed = random_bytes((2, 8), torch.uint8, seed=0).view(torch.float4_e2m1fn_x2)
    checkpoint = open_checkpoint(write_model(tmp_path, {"model.safetensors": {"x": packed}}))
    assert checkpoint.tensors["x"].shape == (2, 16)
    assert torch.equal(checkpoint.read(["x"])["x"].view(torch.uint8), packed.view(torch.uint8))


def test_names_are_in_natural_order_over_shards(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    assert list(checkpoint.tensors) == ["layers.2.w", "layers.9.w", "layers.10.w"]
    assert natural_key("a.9") < natural_key("a.10") < natural_key("a.10.b") < natural_key("b.1")
    assert natural_key("a." + "9" * 5000) < natural_key("a.1" + "0" * 5000)


def test_what_was_read_outlives_the_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path, {"model.safetensors": ONE}))
    found = checkpoint.read(["a"])["a"]
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * (tmp_path / "model.safetensors").stat().st_size)
    assert torch.equal(found, ONE["a"])


def test_a_file_that_got_shorter_is_noticed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path, {"model.safetensors": ONE}))
    file = tmp_path / "model.safetensors"
    lazy = checkpoint.slices(["a"])["a"]
    os.truncate(file, file.stat().st_size - 4)
    for read in (lambda: checkpoint.read(["a"]), lambda: lazy[...]):
        with pytest.raises(CheckpointError, match="4 of 24 bytes of 'a' are missing"):
            read()
    with pytest.raises(CheckpointError, match="got shorter"):
        checkpoint.fingerprint()
    file.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.read(["a"])


def test_unknown_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path, {"model.safetensors": ONE}))
    for method in (checkpoint.read, checkpoint.slices):
        with pytest.raises(CheckpointError, match="no tensor 'b' among the 1"):
            method(["b"])


def test_slices_are_lazy_and_stay_valid(tmp_path: Path) -> None:
    slices = open_checkpoint(sharded(tmp_path)).slices(["layers.2.w", "layers.9.w"])
    assert slices["layers.2.w"].get_shape() == [2, 2]
    assert slices["layers.2.w"].get_dtype() == "F32"
    assert torch.equal(slices["layers.2.w"][1:, :1], torch.tensor([[7.0]]))
    assert torch.equal(slices["layers.9.w"][...], torch.zeros(4))


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    sharded(tmp_path)
    code = (
        "import sys; from moetools.checkpoint.reader import open_checkpoint as o; c = o(sys.argv[1]);"
        "c.fingerprint(); c.sidecar_files(); assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_fingerprint_follows_config_headers_and_sampled_bytes(tmp_path: Path) -> None:
    def fingerprint(value: torch.Tensor, config: str = "{}", name: str = "w") -> str:
        save_file({name: value}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(config)
        return open_checkpoint(tmp_path).fingerprint()

    value = torch.zeros(30_000, dtype=torch.uint8)
    marks = [0, 4095, 15_000, 29_999]
    changed = [value.clone().index_fill_(0, torch.tensor(mark), 1) for mark in marks]
    found = [fingerprint(tensor) for tensor in (value, *changed)]
    found += [fingerprint(value, config='{"a": 1}'), fingerprint(value, name="v"), fingerprint(value.view(torch.int8))]
    assert len(set(found)) == len(found)
    assert fingerprint(value) == found[0]
    small = torch.zeros(10_000, dtype=torch.uint8)
    assert fingerprint(small) != fingerprint(small.clone().index_fill_(0, torch.tensor(4500), 1))


def hugging_face_cache(root: Path) -> Path:
    """A snapshot as huggingface_hub lays it out: every file is a link into blobs/."""
    model = sharded(root / "plain")
    (model / "tokenizer.json").write_text("{}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("x")
    snapshot = root / "models--org--toy" / "snapshots" / "abc"
    blobs = root / "models--org--toy" / "blobs"
    blobs.mkdir(parents=True)
    files = [file for file in sorted(model.rglob("*")) if file.is_file()]
    for number, file in enumerate(files):
        (blobs / str(number)).write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return snapshot


def test_hugging_face_cache_snapshot(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(hugging_face_cache(tmp_path))
    assert torch.equal(checkpoint.read(["layers.2.w"])["layers.2.w"], torch.full((2, 2), 7.0))
    assert checkpoint.fingerprint() == open_checkpoint(tmp_path / "plain").fingerprint()
    names = [str(name) for name in checkpoint.sidecar_files()]
    assert names == ["additional_chat_templates/rag.jinja", "tokenizer.json"]
    (checkpoint.path / "vocab.txt").symlink_to("../../blobs/absent")
    with pytest.raises(CheckpointError, match=r"vocab\.txt: a link to '\.\./\.\./blobs/absent'"):
        checkpoint.sidecar_files()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mtp.fc.weight": "model-00001-of-00002.safetensors"}, "no file holds tensor 'mtp.fc.weight', which"),
        ({"layers.9.w": None}, "does not name tensor 'layers.9.w'; loaded as stock does"),
        ({"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}, "tensor 'a' and 1 more,"),
    ],
)
def test_the_index_chooses_files_and_the_files_hold_the_tensors(tmp_path, caplog, change, said):
    """As in stock transformers, which reads every tensor of every file that the index names."""
    sharded(tmp_path)
    file = tmp_path / "model.safetensors.index.json"
    named = json.loads(file.read_text())["weight_map"] | change
    write_index(tmp_path, {name: shard for name, shard in named.items() if shard})
    assert list(open_checkpoint(tmp_path).tensors) == ["layers.2.w", "layers.9.w", "layers.10.w"]
    (record,) = caplog.records
    assert said in record.getMessage()


def test_an_adapter_beside_the_model_is_said_and_left(tmp_path, caplog):
    write_model(tmp_path, {"model.safetensors": ONE, "adapter_model.safetensors": {"lora_A": torch.ones(2)}})
    (tmp_path / "adapter_config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a"]
    assert checkpoint.sidecar_files() == []
    (record,) = caplog.records
    assert "holds an adapter (adapter_config.json), which is neither used nor carried over" in record.getMessage()


@pytest.mark.parametrize("has_config", [False, True])
def test_an_adapter_is_no_model(tmp_path, has_config):
    write_model(tmp_path, {"adapter_model.safetensors": {"lora_A": torch.ones(2)}})
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    if not has_config:
        (tmp_path / "config.json").unlink()
    error = refused(tmp_path)
    assert error.message == f"'{tmp_path}' is an adapter of org/base, not a model"
    assert "merge_and_unload()" in error.hint


def test_sidecars_are_everything_but_weights_and_what_is_written_anew(tmp_path: Path) -> None:
    carried = ["LICENSE", "chat_template.jinja", "generation_config.json", "modeling_toy.py", "tokenizer.model"]
    carried += ["extra/config.json", "extra/README.md", ".gitattributes", "quantize.json"]
    left = ["moetools.json", "README.md", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "x.gguf"]
    left += ["original/consolidated.00.pth", "consolidated.safetensors", "tf_model.h5", ".git/HEAD", ".cache/x", "o.pt"]
    write_model(tmp_path, {"model.safetensors": ONE})
    for name in carried + left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [str(name) for name in open_checkpoint(tmp_path).sidecar_files()] == sorted(carried)


def test_missing_folder_hints(tmp_path: Path) -> None:
    (tmp_path / "mixtral").mkdir()
    assert refused(tmp_path / "mixtrl").hint == f"did you mean '{tmp_path / 'mixtral'}'?"
    assert "hf download org/some-model" in refused(Path("org/some-model")).hint
    assert refused(tmp_path / "no" / "such").hint == "only local folders are read"
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(tmp_path / "file").message
    assert "`data`" in refused(tmp_path / "file").hint
    assert "holds no config.json" in refused(tmp_path / "mixtral").message
    model = write_model(tmp_path / "m", {"model.safetensors": ONE})
    assert refused(model / "model.safetensors").hint == f"did you mean '{model}'?"
    (tmp_path / "mixtral" / "q4.gguf").write_text("GGUF")
    assert refused(tmp_path / "mixtral").hint == "start from the original model; GGUF is an output format"


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"a"', "[" * 100_000, "\xff"])
def test_config_must_be_a_json_object(tmp_path: Path, text: str) -> None:
    write_model(tmp_path, {"model.safetensors": ONE})
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refused(tmp_path).message


def test_no_safetensors(tmp_path: Path) -> None:
    write_model(tmp_path, {})
    assert "no *.safetensors" in refused(tmp_path).message
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "only GGUF weights ('a.gguf')" in refused(tmp_path).message
    for name in ("model.pt", "consolidated.00.pth", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n")
        assert "only pickled weights" in refused(tmp_path).message
        assert "save_pretrained" in refused(tmp_path).hint
        (tmp_path / name).unlink()


GOOD = json.dumps({"a": ENTRY}).encode()
BAD_FILES = {
    "empty": (b"", "0 bytes is too short"),
    "short": (b"\1\0\0", "3 bytes is too short"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "length beyond file": ((500).to_bytes(8, "little") + b"{}", "needs 508 bytes, the file has 10"),
    "length beyond limit": ((10**8 + 1).to_bytes(8, "little") + b"{}", "exceeds the format's limit of 100000000"),
    "not json": ((2).to_bytes(8, "little") + b"{x", "not valid JSON"),
    "not utf-8": ((2).to_bytes(8, "little") + b"\xff\xfe", "not valid JSON"),
    "not an object": ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
    "nested deeply": ((90_000).to_bytes(8, "little") + b"[" * 90_000, "not valid JSON"),
    "truncated": (len(GOOD).to_bytes(8, "little") + GOOD + b"1234567", "truncated: the header describes"),
    "bytes left over": (len(GOOD).to_bytes(8, "little") + GOOD + b"123456789", "belong to no tensor"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_corrupt_file(tmp_path: Path, case: str) -> None:
    write_model(tmp_path, {})
    data, words = BAD_FILES[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    error = refused(tmp_path)
    assert words in error.message
    assert "model.safetensors" in error.message
    assert error.hint


BAD_HEADERS = {
    "unknown dtype": ({"a": ENTRY | {"dtype": "Q8"}}, "unknown dtype 'Q8'"),
    "dtype is a list": ({"a": ENTRY | {"dtype": []}}, "unknown dtype []"),
    "shape too large": ({"a": ENTRY | {"shape": [3]}}, "does not fit the 8 bytes"),
    "shape too small": ({"a": ENTRY | {"shape": [1]}}, "does not fit the 8 bytes"),
    "negative shape": ({"a": ENTRY | {"shape": [-1, -2]}}, "illegal shape"),
    "float shape": ({"a": ENTRY | {"shape": [2.0]}}, "illegal shape"),
    "bool shape": ({"a": ENTRY | {"shape": [True, 2]}}, "illegal shape"),
    "overflowing shape": ({"a": {"dtype": "U8", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, "does not fit"),
    "half a byte": ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, "does not fit"),
    "backward offsets": ({"a": ENTRY | {"data_offsets": [8, 0]}}, "illegal shape"),
    "three offsets": ({"a": ENTRY | {"data_offsets": [0, 8, 8]}}, "illegal shape"),
    "out of range": ({"a": ENTRY | {"data_offsets": [8, 16]}}, "leaves a gap"),
    "gap": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, "leaves a gap"),
    "overlap": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, "overlaps"),
    "same range": ({"a": ENTRY, "b": ENTRY}, "overlaps"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "must have exactly"),
    "entry is a number": ({"a": 3}, "must have exactly"),
    "metadata is a number": ({"__metadata__": 3}, "must map text to text"),
    "metadata of numbers": ({"__metadata__": {"a": 3}}, "must map text to text"),
    "name twice": (b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{}}', "same key occurs twice"),
    "lone surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}', "not valid JSON"),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_corrupt_header(tmp_path: Path, case: str) -> None:
    write_model(tmp_path, {})
    header, words = BAD_HEADERS[case]
    write_raw(tmp_path / "model.safetensors", header, b"12345678")
    assert words in refused(tmp_path).message


def test_flipped_header_bytes_are_refused_or_harmless(tmp_path: Path) -> None:
    write_model(tmp_path, {"model.safetensors": {f"t.{i}": torch.ones(i, 3) for i in range(4)}})
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(0)
    outcomes = {"refused": 0, "opened": 0}
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 8])):
            changed[draw.randrange(header_end)] = draw.choice([draw.randrange(256), *b'{}[]",:0129eE-'])
        file.write_bytes(changed[: draw.choice([len(data), len(data), draw.randrange(len(data))])])
        try:
            read_header(file)
            outcomes["opened"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20


def test_an_index_decides_which_files_count(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"other names for the same weights")
    assert set(open_checkpoint(tmp_path).headers) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    save_file(ONE, tmp_path / "model.safetensors")
    assert "holds both" in refused(tmp_path).message


def test_without_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert len(open_checkpoint(tmp_path).tensors) == 3
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert "first 'other.safetensors'" in refused(tmp_path).message
    (tmp_path / "other.safetensors").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    assert "shard 1 is missing" in refused(tmp_path).message
    save_file(ONE, tmp_path / "model-00001-of-00003.safetensors")
    assert "one complete set" in refused(tmp_path).message
    save_file(ONE, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    write_model(tmp_path, {"model-00001-of-00002.safetensors": ONE, "model-00002-of-00002.safetensors": ONE})
    assert "tensor 'a' is in both 'model-00001" in refused(tmp_path).message


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "", "..\\x.safetensors", 3, None, "a\0b"],
)
def test_index_must_stay_inside(tmp_path: Path, name: object) -> None:
    write_index(write_model(tmp_path / "m", {"s.safetensors": ONE}), {"a": name})
    save_file(ONE, tmp_path / "x.safetensors")
    assert "no file of this folder" in refused(tmp_path / "m").message


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 3])
def test_malformed_index(tmp_path: Path, weight_map: object) -> None:
    write_index(write_model(tmp_path, {"model-00001-of-00001.safetensors": ONE}), weight_map)
    assert "'weight_map'" in refused(tmp_path).message
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "not valid JSON" in refused(tmp_path).message


def test_an_index_beside_a_whole_file_can_be_deleted(tmp_path: Path) -> None:
    model = write_model(tmp_path, {"model.safetensors": ONE})
    write_index(model, {})
    assert refused(model).hint == "model.safetensors needs none: delete it"
    (model / "model.safetensors.index.json").unlink()
    assert list(open_checkpoint(model).tensors) == ["a"]


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    sharded(tmp_path)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    right = {"layers.10.w": first, "layers.9.w": first, "layers.2.w": second}
    write_index(tmp_path, right | {"layers.9.w": second})
    assert f"says '{second}'" in refused(tmp_path).message
    write_index(tmp_path, right | {"layers.9.w": "pytorch_model.bin"})
    assert "no safetensors file" in refused(tmp_path).message
    write_index(tmp_path, right | {"layers.9.w": "x" * 300 + ".safetensors"})
    assert "cannot be read: File name too long" in refused(tmp_path).message
    write_index(tmp_path, right)
    (tmp_path / second).unlink()
    assert f"1 of 2 shards are missing, first '{second}'" in refused(tmp_path).message


def test_hundreds_of_shards_open_fast(tmp_path: Path) -> None:
    count = 300
    shards = {
        f"model-{i:05d}-of-{count:05d}.safetensors": {f"layers.{i}.{j}": torch.zeros(1) for j in range(10)}
        for i in range(1, count + 1)
    }
    checkpoint: Checkpoint = open_checkpoint(write_model(tmp_path, shards, index=True))
    assert len(checkpoint.tensors) == 3000
    assert len(checkpoint.read(checkpoint.tensors)) == 3000
