"""Records that cannot be used, compressed files, arrays, files of many megabytes."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from moetools.errors import DataError, UserError
from moetools.text import documents as module
from moetools.text.sources import DataSource, Skipped, iter_documents, parse_data_option, usable

GOOD = [json.dumps({"text": text}) for text in ("a", "b", "c")]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, skipped: Skipped | None = None, **options: str) -> list[str | None]:
    source = DataSource(task="t", location=str(path))
    return [document.text for document in iter_documents(source, skipped=skipped, **options)]


BAD = {
    b"{broken": "not JSON: Expecting property name",
    b'{"text": "\xff"}': "not UTF-8: byte 0xff at offset ",
    b'{"txt": "a"}': "has the keys txt",
    b"[1]": "this is an array, not an object",
    b'{"text": null}': "has null in 'text'",
    b'{"messages": [{"role": "user"}]}': "message 1: 'content' is null or missing",
    b'{"text": "\\ud83d"}': "half of a surrogate pair",
    b'{"text": NaN}': "'text' is a number, not a string",
}


@pytest.mark.parametrize(("line", "reason"), BAD.items())
def test_one_unusable_line_is_left_out_with_its_reason(tmp_path, line, reason):
    file = write(tmp_path / "a.jsonl", b"\n".join([GOOD[0].encode(), line, GOOD[1].encode(), b"", line]))
    skipped = Skipped()
    assert read(file, skipped) == ["a", "b"]
    assert skipped.count == 2
    assert skipped.first is not None
    assert skipped.first.message.startswith(f"{file}:2: ")
    assert reason in skipped.first.message
    with pytest.raises(DataError) as caught:
        read(file, Skipped(strict=True))
    assert caught.value.message == skipped.first.message


def test_a_file_without_one_usable_line_is_refused_with_number_and_first_reason(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"txt": 1}\n{broken\n\n{"txt": 2}\n')
    with pytest.raises(DataError) as caught:
        read(file)
    assert caught.value.message.startswith(
        f"{file}: none of the 3 records can be used; the first: {file}:1: has the keys"
    )
    assert "`column=KEY`" in caught.value.hint


def test_every_file_of_a_directory_has_to_give_something(tmp_path):
    write(tmp_path / "a.jsonl", GOOD[0])
    bad = write(tmp_path / "b.jsonl", '{"txt": 1}\n{"txt": 2}\n')
    with pytest.raises(DataError, match=r"b.jsonl: none of the 2 records can be used"):
        read(tmp_path)
    bad.unlink()
    assert read(tmp_path) == ["a"]


def test_an_endless_source_without_a_usable_record_ends():
    def endless():
        while True:
            yield DataError("no 'text'", hint="name one")

    with pytest.raises(DataError, match="none of the first 1,000 records can be used; the first: no 'text'"):
        list(usable(endless(), "hf:set", Skipped()))


def test_rows_of_a_table_are_skipped_too(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": ["a", None, "b"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    skipped = Skipped()
    assert read(tmp_path / "a.parquet", skipped) == ["a", "b"]
    assert (skipped.count, skipped.first.message.partition(";")[0]) == (
        1,
        f"{tmp_path}/a.parquet:2: has null in 'text'",
    )


def test_a_column_of_a_table(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    chat = [{"role": "user", "content": "hi"}]
    table = {
        "text": ["t"],
        "body": ["b"],
        "chosen": [chat],
        "prompt": ["p"],
        "completion": ["c"],
        "tools": ['[{"a": 1}]'],
    }
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", column="body") == ["b"]
    assert read(tmp_path / "a.parquet", column="prompt") == ["pc"]
    source = DataSource(task="t", location=str(tmp_path / "a.parquet"))
    (document,) = iter_documents(source, column="chosen")
    assert (document.messages, document.tools) == (chat, [{"a": 1}])
    with pytest.raises(DataError, match="which of them is the text"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the columns text, body, chosen"):
        read(tmp_path / "a.parquet", column="boddy")


def test_a_damaged_table_is_one_line_with_its_cause(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [f"some text {i}" for i in range(5000)]}), file, compression="gzip")
    raw = bytearray(file.read_bytes())
    raw[200:2000] = bytes(1800)
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"a.parquet cannot be read as parquet: \w+") as caught:
        read(file)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz", ".txt.gz", ".JSONL.GZ"])
def test_gzip(tmp_path, suffix):
    content = "plain" if suffix == ".txt.gz" else GOOD[0] + "\n" + GOOD[1]
    file = write(tmp_path / f"code.v2{suffix}", gzip.compress(content.encode()))
    (source,) = parse_data_option([str(file)])
    assert source.task == "code.v2"
    assert read(file) == (["plain"] if suffix == ".txt.gz" else ["a", "b"])
    if suffix != ".json.gz":
        assert len(read(tmp_path)) == len(read(file))


def test_damaged_gzip_files(tmp_path):
    whole = gzip.compress("\n".join(json.dumps({"text": str(i) * 50}) for i in range(2000)).encode())
    for name, content, cause in (
        ("cut", whole[:-2000], "EOFError: Compressed file ended"),
        ("other", b"\x1f\x8a", "BadGzipFile: Not a gzipped file"),
        ("flipped", whole[:300] + bytes(200) + whole[500:], "BadGzipFile: CRC check failed"),
    ):
        with pytest.raises(DataError, match=rf"{name}.jsonl.gz cannot be read: {cause}") as caught:
            read(write(tmp_path / f"{name}.jsonl.gz", content))
        assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "start", "kind"),
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer, not the data"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer, not the data"),
        ("a.jsonl", gzip.compress(GOOD[0].encode(), mtime=0), "compressed with gzip"),
        ("a.txt", b"\x28\xb5\x2f\xfd\x00", "compressed with zstandard"),
        ("a.json", b"PAR1\x15", "a parquet file"),
        ("a.jsonl.gz", b"PK\x03\x04", "a zip archive"),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path, name, start, kind):
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / name, start))
    assert caught.value.message == f"{tmp_path / name} is {kind}"
    assert caught.value.hint


def test_files_that_were_joined_have_a_byte_order_mark_inside(tmp_path):
    assert read(write(tmp_path / "a.jsonl", b"".join(b"\xef\xbb\xbf" + line.encode() + b"\n" for line in GOOD))) == [
        *"abc"
    ]


def test_a_text_given_as_a_path():
    with pytest.raises(DataError, match="`data=once upon a time") as caught:
        parse_data_option(["once upon a time " * 400])
    assert "File name too long" in caught.value.message
    assert len(caught.value.message) < 120


def test_compressed_tables_and_ids_are_no_known_format(tmp_path):
    for name in ("a.safetensors.gz", "a.parquet.zst", "a.gz", "a.csv.gz"):
        with pytest.raises(DataError, match=r"unknown data format '\.\w+'; legal suffixes: .* also with .gz or .zst"):
            parse_data_option([str(write(tmp_path / name, b""))])


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the standard library reads zstandard")
def test_zstandard_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="needs the package zstandard") as caught:
        read(write(tmp_path / "a.jsonl.zst", b"x"))
    assert caught.value.hint == "pip install 'zstandard'"


def test_zstandard_of_several_frames(tmp_path):
    if sys.version_info < (3, 14):
        compress = pytest.importorskip("zstandard").compress
    else:
        compress = pytest.importorskip("compression.zstd").compress
    file = write(tmp_path / "a.jsonl.zst", compress(f"{GOOD[0]}\n".encode()) + compress(GOOD[1].encode()))
    assert read(file) == ["a", "b"]
    with pytest.raises(DataError, match=r"a.jsonl.zst cannot be read: \w+"):
        read(write(file, b"not compressed"))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz"])
def test_a_file_that_is_one_array(tmp_path, suffix):
    """As ShareGPT's own file is."""
    text = "\ufeff" + json.dumps([{"text": "a"}, 3, {"text": "b"}], indent=2)
    raw = text.encode()
    file = write(tmp_path / f"a{suffix}", gzip.compress(raw) if suffix.endswith(".gz") else raw)
    skipped = Skipped()
    assert read(file, skipped) == ["a", "b"]
    assert (skipped.count, skipped.first.message) == (1, f"{file}:2: this is a number, not an object")


def test_an_array_that_is_cut_off_or_empty(tmp_path):
    with pytest.raises(DataError, match=r"a.json:1: not JSON: JSONDecodeError: Unterminated string"):
        read(write(tmp_path / "a.json", '[{"text": "a"}, {"te'))
    with pytest.raises(DataError, match=r"b.json is empty"):
        read(write(tmp_path / "b.json", "[]"))


def test_a_long_text_file_is_read_in_parts_that_end_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TEXT_BYTES", 10)
    file = write(tmp_path / "a.txt", b"\xef\xbb\xbf0123456789ab\ncd\n\n\xc3\xbcbers\nlast")
    assert read(file) == ["0123456789ab\n", "cd\n\nübers\n", "last"]
    bad = write(tmp_path / "b.txt", b"0123456789ab\ncd\nef\n\xff")
    with pytest.raises(DataError, match=r"b.txt:4: not UTF-8: byte 0xff at offset 19"):
        read(bad)
