"""What is written, and what is never overwritten."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import DTYPES, random_bytes, same_bits, toy_units, tree_digest, write_all, write_model
from safetensors import safe_open
from safetensors.torch import save_file

from moetools.checkpoint import durable
from moetools.checkpoint.headers import read_header
from moetools.checkpoint.output import check_apart, staging_path
from moetools.checkpoint.reader import Checkpoint, open_checkpoint
from moetools.checkpoint.writer import CheckpointWriter, check_output
from moetools.errors import CheckpointError, MoetoolsError, UserError


def read_with_the_library(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    return found


def input_model(folder: Path) -> Checkpoint:
    write_model(folder, {"model.safetensors": {"a": torch.ones(3)}})
    (folder / "tokenizer.json").write_bytes(b'{"caf\xc3\xa9": 1}\r\n')
    (folder / "extra").mkdir()
    (folder / "extra" / "template.jinja").write_text("{{ x }}")
    (folder / "generation_config.json").write_text("{}")
    return open_checkpoint(folder)


def refused(error: type[MoetoolsError], out: Path, **options: Any) -> MoetoolsError:
    before = tree_digest(out.parent) if out.parent.is_dir() else {}
    plain = {"overwrite": False, "resume": False, "expected_bytes": 0}
    with pytest.raises(error) as caught:
        check_output(out, **plain | options)
    with pytest.raises(error):
        CheckpointWriter(out, plan={}, **{"expected_bytes": 0} | options)
    assert (tree_digest(out.parent) if out.parent.is_dir() else {}) == before
    assert not staging_path(out).exists()
    return caught.value


@pytest.mark.parametrize("max_shard_bytes", [2**31, 3000, 1], ids=["one file", "joined shards", "a shard per unit"])
def test_every_dtype_and_shape_survives_bit_for_bit(tmp_path: Path, max_shard_bytes: int) -> None:
    shapes = [(3, 5), (0, 4), (), (1,), (2, 3, 4)]
    # e8m0 and 4-bit floats are covered below: the library's slicing of them is incomplete.
    units = {
        f"unit.{n}": {f"{n}.{dtype}.{shape}": random_bytes(shape, dtype, seed=n) for shape in shapes}
        for n, dtype in enumerate(DTYPES)
    }
    out, _ = write_all(tmp_path / "out", units, max_shard_bytes=max_shard_bytes)
    meant = {name: tensor for tensors in units.values() for name, tensor in tensors.items()}
    found = read_with_the_library(out)
    assert found.keys() == meant.keys()
    assert all(same_bits(found[name], meant[name]) for name in meant)
    ours = open_checkpoint(out).read(meant)
    assert all(same_bits(ours[name], meant[name]) for name in meant)


def test_packed_4_bit_floats(tmp_path: Path) -> None:
    packed = random_bytes((2, 8), torch.uint8, seed=0).view(torch.float4_e2m1fn_x2)
    out, _ = write_all(tmp_path / "out", {"a": {"x": packed}, "b": {"y": torch.ones(2)}})
    found = read_with_the_library(out)["x"]
    assert found.dtype == packed.dtype
    assert torch.equal(found.view(torch.uint8), packed.view(torch.uint8))


def test_a_joined_file_is_what_the_library_would_have_written(tmp_path: Path) -> None:
    units = {f"u{i}": {f"t{i}": random_bytes((5, i + 1), torch.bfloat16, i)} for i in range(9)}
    out, _ = write_all(tmp_path / "out", units)
    save_file(
        {name: tensor for tensors in units.values() for name, tensor in tensors.items()},
        tmp_path / "reference",
        metadata={"format": "pt"},
    )
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "reference").read_bytes()


def test_tensors_lie_on_multiples_of_their_element_size(tmp_path: Path) -> None:
    units = {
        f"u{i}": {f"{i}.{dtype}": random_bytes((3,), dtype, i) for dtype in (torch.int8, torch.float32, torch.bfloat16)}
        for i in range(5)
    }
    out, _ = write_all(tmp_path / "out", units)
    element = {"I8": 1, "BF16": 2, "F32": 4}
    for info in read_header(out / "model.safetensors").tensors:
        assert info.offset % element[info.dtype] == 0


def test_views_and_shared_memory_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "t": base.T,
        "row": base[1:3],
        "same": base,
        "step": base[:, ::2],
        "grad": torch.ones(2).requires_grad_(),
    }
    out, _ = write_all(tmp_path / "out", {"u": tensors})
    found = read_with_the_library(out)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_shards_and_index(tmp_path: Path) -> None:
    out, _ = write_all(tmp_path / "out", toy_units(5), max_shard_bytes=2600)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(file.name for file in out.iterdir()) == ["config.json", *names, "model.safetensors.index.json"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 1280}
    where = {f"layers.{i}.{part}": names[i // 2] for i in range(5) for part in ("up", "down", "bias")}
    assert index["weight_map"] == where
    assert open_checkpoint(out).total_bytes == 5 * 1280


def test_a_unit_larger_than_a_shard_and_one_without_tensors(tmp_path: Path) -> None:
    units = {"empty": {}, "large": {"x": torch.ones(1000)}, "small": {"y": torch.ones(1)}}
    out, _ = write_all(tmp_path / "out", units, max_shard_bytes=100)
    assert set(open_checkpoint(out).tensors) == {"x", "y"}
    only_empty, _ = write_all(tmp_path / "none", {"empty": {}})
    assert open_checkpoint(only_empty).tensors == {}


def test_sidecars_are_copied_byte_for_byte_and_written_files_win(tmp_path: Path) -> None:
    source = input_model(tmp_path / "in")
    with CheckpointWriter(tmp_path / "out", plan={}, expected_bytes=0) as writer:
        writer.write_unit("u", {"a": torch.ones(3)})
        writer.write_json("generation_config.json", {"b": "\u00e9\ud800", "a": 1})
        writer.carry_sidecars(source)
        writer.write_text("docs/README.md", "caf\u00e9")
        out = writer.commit()
    for name in ("tokenizer.json", "extra/template.jinja"):
        assert (out / name).read_bytes() == (source.path / name).read_bytes()
    assert list(json.loads((out / "generation_config.json").read_text())) == ["b", "a"]
    assert (out / "docs" / "README.md").read_text(encoding="utf-8") == "caf\u00e9"
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]  # noqa: PTH208


def test_sidecars_that_are_links_inside_the_model_are_copied_as_files(tmp_path: Path) -> None:
    source = input_model(tmp_path / "in")
    (source.path / "words.txt").write_text("vocabulary")
    (source.path / "words.txt").chmod(0o750)
    (source.path / "vocab.txt").symlink_to("words.txt")
    out, _ = write_all(tmp_path / "out", {"u": {"a": torch.ones(3)}}, source=source)
    assert not (out / "vocab.txt").is_symlink()
    assert (out / "vocab.txt").read_text() == "vocabulary"
    assert {(out / name).stat().st_mode & 0o777 for name in ("vocab.txt", "words.txt")} == {0o750}


def test_sidecars_that_are_links_out_of_the_model_are_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = input_model(tmp_path / "in")
    secret = tmp_path / "secret"
    secret.write_text("key")
    (source.path / "LICENSE").symlink_to(secret)
    (source.path / "extra" / "NOTICE").symlink_to("../../secret")
    out, _ = write_all(tmp_path / "out", {"u": {"a": torch.ones(3)}}, source=source)
    assert not [file for file in out.rglob("*") if file.name in ("LICENSE", "NOTICE")]
    assert sorted(caplog.messages) == sorted(
        f"{source.path / name}: a link to '{secret}', outside the model: not carried over"
        for name in ("LICENSE", "extra/NOTICE")
    )


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "."])
def test_names_outside_the_output(tmp_path: Path, name: str) -> None:
    with (
        CheckpointWriter(tmp_path / "out", plan={}, expected_bytes=0) as writer,
        pytest.raises(ValueError, match="not a file inside the output"),
    ):
        writer.write_text(name, "x")
    assert list(tmp_path.iterdir()) == []


def test_misuse_is_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", plan={}, expected_bytes=0) as writer:
        with pytest.raises(ValueError, match="no unit was written"):
            writer.commit()
        writer.write_unit("u", {"a": torch.ones(1)})
        with pytest.raises(ValueError, match="'u' is already written"):
            writer.write_unit("u", {"b": torch.ones(1)})
        with pytest.raises(ValueError, match="tensor 'a' of unit 'v' was already written by unit 'u'"):
            writer.write_unit("v", {"b": torch.ones(1), "a": torch.ones(1)})
        with pytest.raises(KeyError):
            writer.payload("v")
        assert open_checkpoint_like(writer.assemble()) == {"a"}
        with pytest.raises(ValueError, match="after the shards were assembled"):
            writer.write_unit("v", {"b": torch.ones(1)})
        writer.commit()


def open_checkpoint_like(folder: Path) -> set[str]:
    return {info.name for info in read_header(folder / "model.safetensors").tensors}


def test_leaving_without_commit(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", plan={}, expected_bytes=0):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", plan={}, expected_bytes=0):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with CheckpointWriter(tmp_path / "out", plan={}, expected_bytes=0) as writer:
        writer.write_unit("u", {"a": torch.ones(1)})
    assert list(tmp_path.iterdir()) == [writer.staging]


def test_existing_output(tmp_path: Path) -> None:
    out, _ = write_all(tmp_path / "out", toy_units(1))
    assert refused(UserError, out).hint == "choose another name, or replace it with `overwrite`"
    assert "nothing is left to resume" in refused(UserError, out, resume=True).message
    (tmp_path / "file").write_text("x")
    assert "it is a file" in refused(UserError, tmp_path / "file", overwrite=True).message
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    assert "refusing to overwrite" in refused(UserError, tmp_path / "thesis", overwrite=True).message
    assert "exists" in refused(UserError, tmp_path / "thesis").message
    assert "does not exist" in refused(UserError, tmp_path / "no" / "out").message


@pytest.mark.parametrize("before", ["checkpoint", "moetools.json only", "empty folder"])
@pytest.mark.parametrize("atomic", [True, False])
def test_overwrite(tmp_path: Path, before: str, atomic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if before == "checkpoint":
        write_model(out, {"old.safetensors": {"old": torch.ones(1)}})
    elif before != "empty folder":
        (out / "moetools.json").write_text("{}")
    if not atomic:
        monkeypatch.setattr(durable, "exchange", lambda *_: False)
    reference, _ = write_all(tmp_path / "reference", toy_units())
    write_all(out, toy_units(), overwrite=True)
    assert tree_digest(out) == tree_digest(reference)
    assert sorted(os.listdir(tmp_path)) == ["out", "reference"]  # noqa: PTH208


def test_a_failing_replacement_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_model(tmp_path / "out", {"model.safetensors": {"old": torch.ones(1)}})
    before = tree_digest(out)
    monkeypatch.setattr(durable, "exchange", lambda *_: False)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "contents":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(CheckpointError, match="Input/output error"):
            write_all(out, toy_units(), overwrite=True)
    assert tree_digest(out) == before
    _, written = write_all(out, toy_units(), overwrite=True, resume=True)
    assert written == []
    assert "old" not in open_checkpoint(out).tensors


def test_a_kill_between_the_two_renames_is_undone_by_the_next_run(tmp_path: Path) -> None:
    out = write_model(tmp_path / "out", {"model.safetensors": {"old": torch.ones(1)}})
    before = tree_digest(out)
    with CheckpointWriter(out, plan={}, expected_bytes=0, overwrite=True) as writer:
        writer.write_unit("u", {"a": torch.ones(1)})
    out.rename(writer.staging / "replaced")
    with pytest.raises(UserError, match="exists"):
        CheckpointWriter(out, plan={}, expected_bytes=0, resume=True)
    assert tree_digest(out) == before


def test_exchange_swaps_or_says_no(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if durable.exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a" / "file").read_text() == "b"
        assert (tmp_path / "b" / "file").read_text() == "a"
        with pytest.raises(FileNotFoundError):
            durable.exchange(tmp_path / "a", tmp_path / "absent")


def touching(writes: dict[str, Path], **reads: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_apart(writes, reads)
    return caught.value.message


def test_what_a_run_writes_must_not_touch_what_it_reads(tmp_path: Path) -> None:
    model = input_model(tmp_path / "models" / "in").path
    text = tmp_path / "out" / "text.jsonl"
    for out, words in [
        (model, "is"),
        (tmp_path / "models" / ".." / "models" / "in", "is"),
        (model / "out", "lies inside"),
        (tmp_path / "models", "contains"),
    ]:
        assert touching({"output": out}, model=model) == f"output '{out}' {words} model '{model}'"
    (tmp_path / "link").symlink_to(model)
    assert "is model" in touching({"output": tmp_path / "link"}, model=model)
    assert "is teacher" in touching({"output": model}, teacher=tmp_path / "link")
    assert "contains data" in touching({"output": tmp_path / "out"}, data=text)
    statistics = {"--save-stats": model / "model.safetensors"}
    assert "lies inside model" in touching(statistics, model=model)
    assert "contains --save-stats" in touching({"output": tmp_path / "out", "--save-stats": text}, model=model)
    check_apart({"output": tmp_path / "new", "--html": tmp_path / "new.html"}, {"model": model, "data": text})


def test_output_must_not_hold_the_weights_an_input_links_to(tmp_path: Path) -> None:
    real = input_model(tmp_path / "real")
    (tmp_path / "view").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "view" / name).symlink_to(real.path / name)
    assert "contains model" in touching({"output": real.path}, model=tmp_path / "view")


def test_not_enough_space(tmp_path: Path) -> None:
    message = refused(CheckpointError, tmp_path / "out", expected_bytes=10**18).message
    assert "needs 1050000.00 TB, but" in message


def test_read_only_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "no permission" in refused(UserError, tmp_path / "out").message


def test_two_runs_cannot_write_one_output(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", plan={}, expected_bytes=0) as writer:
        writer.write_unit("u", {"a": torch.ones(1)})
        for resume in (True, False):
            with pytest.raises(UserError, match="another moetools run is writing"):
                CheckpointWriter(tmp_path / "out", plan={}, expected_bytes=0, resume=resume)
        writer.commit()
    assert set(open_checkpoint_tensors(tmp_path / "out")) == {"a"}


def open_checkpoint_tensors(folder: Path) -> list[str]:
    (folder / "config.json").write_text("{}")
    return list(open_checkpoint(folder).tensors)


def test_a_folder_that_is_not_ours_is_never_removed(tmp_path: Path) -> None:
    staging = staging_path(tmp_path / "out")
    staging.mkdir()
    (staging / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="not a staging folder of moetools"):
        CheckpointWriter(tmp_path / "out", plan={}, expected_bytes=0)
    assert tree_digest(tmp_path).keys() == {f"{staging.name}/precious"}
