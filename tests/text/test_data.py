import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from moetools.errors import DataError, UserError
from moetools.text.sources import DataSource, Skipped, iter_documents, parse_data_option


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(path: Path, *records: object) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def texts(location: Path | str) -> list[str | None]:
    return [document.text for document in iter_documents(DataSource(task="t", location=str(location)))]


def refusal(location: Path | str) -> DataError:
    """What a strict reading says."""
    with pytest.raises(DataError) as caught:
        list(iter_documents(DataSource(task="t", location=str(location)), skipped=Skipped(strict=True)))
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


def test_importing_data_imports_neither_torch_nor_transformers():
    code = "import sys, moetools.text.sources; print({'torch', 'transformers', 'pyarrow'} & sys.modules.keys() or '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_bare_path_names_the_task_by_stem_directory_or_dataset(tmp_path, monkeypatch):
    file = lines(tmp_path / "corpus" / "code.v2.jsonl", {"text": "x"})
    monkeypatch.chdir(tmp_path / "corpus")
    values = [str(file), str(tmp_path / "corpus"), "hf:org/wiki:en"]
    assert [s.task for s in parse_data_option(values)] == ["code.v2", "corpus", "wiki"]
    assert parse_data_option(["."])[0].task == "corpus"


def test_a_named_value_is_split_at_its_first_equals_sign(tmp_path):
    file = lines(tmp_path / "a=b.jsonl", {"text": "x"})
    assert parse_data_option([f"my-task_1.0={file}"]) == [DataSource(task="my-task_1.0", location=str(file))]
    assert parse_data_option([f"w=hf:{tmp_path}"])[0].location == f"hf:{tmp_path}"


def test_an_existing_path_with_an_equals_sign_is_a_path(tmp_path, monkeypatch):
    lines(tmp_path / "a=b.jsonl", {"text": "x"})
    monkeypatch.chdir(tmp_path)
    assert parse_data_option(["a=b.jsonl"]) == [DataSource(task="a=b", location="a=b.jsonl")]


def test_the_home_directory_is_expanded_behind_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lines(tmp_path / "x.jsonl", {"text": "home"})
    assert texts(parse_data_option(["n=~/x.jsonl"])[0].location) == ["home"]


def test_two_tasks_of_one_name_are_refused(tmp_path):
    first, second = (
        lines(tmp_path / "a" / "train.jsonl", {"text": "x"}),
        lines(tmp_path / "b" / "train.jsonl", {"text": "x"}),
    )
    with pytest.raises(UserError, match=r"two data sets are named 'train'") as caught:
        parse_data_option([str(first), str(second)])
    assert caught.value.hint == f"name them: `data=NAME={second}`"


@pytest.mark.parametrize("value", ["", "name=", "  "])
def test_an_empty_value_is_refused(value):
    with pytest.raises(UserError, match="names no data"):
        parse_data_option([value])


@pytest.mark.parametrize(
    ("location", "parts"),
    [
        ("hf:org/set", ("org/set", None, "train")),
        ("hf:set:en", ("set", "en", "train")),
        ("hf:set:test", ("set", None, "test")),
        ("hf:set:train[:10]", ("set", None, "train[:10]")),
        ("hf:set:en:validation", ("set", "en", "validation")),
        ("hf:set:en:train[:10]", ("set", "en", "train[:10]")),
        ("hf:set::extra", ("set", None, "extra")),
    ],
)
def test_parts_of_a_hub_location(location, parts):
    assert DataSource(task="t", location=location).hub() == parts


def test_a_hub_location_without_a_dataset_is_refused():
    with pytest.raises(UserError, match="names no dataset"):
        parse_data_option(["hf:"])


def test_a_missing_path_is_refused_before_reading_and_its_neighbour_named(tmp_path):
    lines(tmp_path / "train.jsonl", {"text": "x"})
    with pytest.raises(DataError, match="no such data") as caught:
        parse_data_option([str(tmp_path / "trian.jsonl")])
    assert caught.value.hint == f"did you mean '{tmp_path / 'train.jsonl'}'?"


def test_a_missing_directory_is_named(tmp_path):
    assert refusal(tmp_path / "no" / "x.jsonl").hint == f"the directory {tmp_path / 'no'} does not exist"
    assert "fetch the file first" in refusal("https://example.com/x.jsonl").hint


def test_a_missing_path_without_neighbours_lists_what_is_legal(tmp_path):
    assert ".txt, .jsonl, .ndjson, .json, .parquet, .safetensors" in refusal(tmp_path / "zzz").hint


def test_text_file_is_one_document(tmp_path):
    file = write(tmp_path / "a.TXT", b"\xef\xbb\xbfone\r\ntwo\n\nGr\xc3\xbc\xc3\x9fe")
    assert texts(file) == ["one\r\ntwo\n\nGrüße"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson"])
def test_json_lines_hold_text_messages_or_prompt_and_completion(tmp_path, suffix):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = lines(
        tmp_path / f"a{suffix}",
        {"text": "one\u2028line", "id": 3},
        {"messages": chat, "prompt": "extra"},
        {"prompt": "2+2=", "completion": "4", "text": None},
    )
    documents = list(iter_documents(DataSource(task="t", location=str(file))))
    assert [(d.text, d.messages) for d in documents] == [("one\u2028line", None), (None, chat), ("2+2=4", None)]
    assert [d.where for d in documents] == [f"{file}:{n}" for n in (1, 2, 3)]


def test_blank_lines_byte_order_mark_and_carriage_returns_are_tolerated(tmp_path):
    file = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b"}')
    documents = list(iter_documents(DataSource(task="t", location=str(file))))
    assert [(d.text, d.where) for d in documents] == [("a", f"{file}:1"), ("b", f"{file}:4")]


def test_a_directory_gives_its_text_files_sorted_and_recursive(tmp_path):
    lines(tmp_path / "b.jsonl", {"text": "b1"}, {"text": "b2"})
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "c" / "d.txt", "d")
    for ignored in ("README.md", "info.json", ".hidden/x.txt", ".x.txt", "t.safetensors"):
        write(tmp_path / ignored, "not data")
    assert texts(tmp_path) == ["a", "b1", "b2", "d"]


def test_a_directory_without_data_is_refused(tmp_path):
    write(tmp_path / "README.md", "x")
    assert "has no .txt, .jsonl, .ndjson, .parquet file" in refusal(tmp_path).message
    with pytest.raises(DataError):
        parse_data_option([str(tmp_path)])


def test_reading_is_lazy(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "good"}\nbroken\n')
    documents = iter_documents(DataSource(task="t", location=str(file)), skipped=Skipped(strict=True))
    assert next(documents).text == "good"
    with pytest.raises(DataError, match=r"a.jsonl:2: not JSON"):
        next(documents)


def test_unknown_suffix(tmp_path):
    error = refusal(write(tmp_path / "a.csv", "x"))
    assert (
        "unknown data format '.csv'; legal suffixes: .txt, .jsonl, .ndjson, .json, .parquet, .safetensors"
        in error.message
    )


@pytest.mark.parametrize("content", ["", "\n \n", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_empty_file(tmp_path, content, suffix):
    file = write(tmp_path / f"a{suffix}", content)
    assert f"{file} is empty" in refusal(file).message


def test_line_that_is_not_utf8_names_byte_and_offset(tmp_path):
    good = b'\xef\xbb\xbf{"text": "a"}\n'
    file = write(tmp_path / "a.jsonl", good + b'{"text": "\xe9t\xe9"}\n')
    error = refusal(file)
    assert error.message == f"{file}:2: not UTF-8: byte 0xe9 at offset {len(good) + 10}"
    assert "iconv" in error.hint


def test_text_file_that_is_not_utf8_names_its_line(tmp_path):
    file = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\ntwo\nth\xffree")
    assert refusal(file).message == f"{file}:3: not UTF-8: byte 0xff at offset 13"


def test_byte_order_mark_counts_in_the_first_lines_offset(tmp_path):
    file = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf"\xff"')
    assert refusal(file).message.endswith("byte 0xff at offset 4")


@pytest.mark.parametrize(
    "line", ['{"text": "a"', "text", '{"text": "a"} {"text": "b"}', "{" * 100_000, '{"n": ' + "1" * 5000 + "}"]
)
def test_malformed_json(tmp_path, line):
    file = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n' + line)
    assert refusal(file).message.startswith(f"{file}:3: not JSON: ")


def test_indented_json_is_explained(tmp_path):
    assert "jq -c" in refusal(write(tmp_path / "a.json", '{\n  "text": "a"\n}\n')).hint


@pytest.mark.parametrize(
    ("line", "kind"), [("[1]", "a number"), ('"a"', "a string"), ("3", "a number"), ("null", "null")]
)
def test_line_that_is_not_an_object(tmp_path, line, kind):
    assert f"a.jsonl:1: this is {kind}" in refusal(write(tmp_path / "a.jsonl", line)).message


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"txt": "a", "id": 1}, "has the keys txt, id; legal is exactly one of 'text' | 'messages' | 'conversations'"),
        ({}, "has the keys (none)"),
        ({"prompt": "a"}, "has the keys prompt"),
        ({"text": None}, "has null in 'text'"),
        ({"text": "a", "messages": [{"role": "user", "content": "b"}]}, "has text and messages"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "has text and prompt and completion"),
        ({"text": 3}, "'text' is a number, not a string"),
        ({"text": ["a"]}, "'text' is an array, not a string"),
        ({"prompt": "a", "completion": {}}, "'completion' is an object, not a string"),
        ({"text": "\ud83d"}, "half of a surrogate pair at character 0"),
        ({"messages": "hi"}, "'messages' is a string, not a list"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": ["hi"]}, "message 1 is a string, not an object"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}, "message 2: 'content' is null or missing"),
        ({"messages": [{"role": 1, "content": "a"}]}, "message 1: 'role' is a number"),
    ],
)
def test_record_that_is_not_legal(tmp_path, record, part):
    file = lines(tmp_path / "a.jsonl", {"text": "fine"}, record)
    message = refusal(file).message
    assert message.startswith(f"{file}:2: ")
    assert part in message


def test_file_that_cannot_be_opened(tmp_path, monkeypatch):
    def denied(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    json_file, text_file = lines(tmp_path / "a.jsonl", {"text": "x"}), write(tmp_path / "a.txt", "x")
    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr(Path, "read_bytes", denied)
    for file in (json_file, text_file):
        assert refusal(file).message == f"{file} cannot be read: Permission denied"


def parquet(path: Path, columns: dict[str, list]) -> Path:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns), path)
    return path


def test_parquet_rows_are_documents(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    file = parquet(tmp_path / "a.parquet", {"id": [1, 2], "text": ["a", None], "messages": [None, chat]})
    documents = list(iter_documents(DataSource(task="t", location=str(file))))
    assert [(d.text, d.messages, d.where) for d in documents] == [("a", None, f"{file}:1"), (None, chat, f"{file}:2")]


def test_parquet_is_read_in_batches(tmp_path):
    file = parquet(tmp_path / "a.parquet", {"text": [str(i) for i in range(600)]})
    assert texts(file) == [str(i) for i in range(600)]


def test_parquet_refusals(tmp_path):
    assert "has the columns body; legal" in refusal(parquet(tmp_path / "a.parquet", {"body": ["x"]})).message
    assert "is empty" in refusal(parquet(tmp_path / "b.parquet", {"text": []})).message
    bad_row = parquet(tmp_path / "c.parquet", {"text": ["x", None]})
    assert refusal(bad_row).message.startswith(f"{bad_row}:2: has null in 'text'")
    assert "cannot be read as parquet" in refusal(write(tmp_path / "d.parquet", "PAR1 no")).message
    assert "'text' is a number" in refusal(parquet(tmp_path / "e.parquet", {"text": [1]})).message


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    file = write(tmp_path / "a.parquet", "x")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="needs the package pyarrow") as caught:
        texts(file)
    assert caught.value.hint == "pip install 'moetools[parquet]'"


class FakeDatasetsError(Exception):
    pass


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets package that records its calls; `rows` may hold an exception to raise."""
    fake = types.ModuleType("datasets")
    fake.exceptions = types.SimpleNamespace(DatasetsError=FakeDatasetsError)
    fake.calls, fake.rows = [], []

    def load_dataset(name, config, *, split, streaming):
        fake.calls.append((name, config, split, streaming))
        for row in fake.rows:
            if isinstance(row, Exception):
                raise row
            yield row

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(key, raising=False)
    return fake


def test_hub_rows_are_streamed(hub):
    hub.rows = [{"text": "a"}, {"text": "b"}, RuntimeError("never reached")]
    documents = iter_documents(DataSource(task="t", location="hf:org/set:en:test"))
    assert [(d.text, d.where) for d in (next(documents), next(documents))] == [
        ("a", "hf:org/set:en:test:1"),
        ("b", "hf:org/set:en:test:2"),
    ]
    assert hub.calls == [("org/set", "en", "test", True)]


def test_hub_does_not_stream_slices_or_offline(hub, monkeypatch):
    hub.rows = [{"text": "a"}]
    texts("hf:set:train[:1]")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    texts("hf:set")
    assert hub.calls == [("set", None, "train[:1]", False), ("set", None, "train", False)]


@pytest.mark.parametrize("error", [FakeDatasetsError("\nboom\nmore"), ConnectionError("boom"), KeyError("boom")])
def test_hub_set_that_cannot_be_loaded(hub, error):
    hub.rows = [{"text": "fine"}, error]
    error_line = refusal("hf:set:en")
    kind, said = type(error).__name__, "'boom'" if isinstance(error, KeyError) else "boom"
    assert error_line.message == f"the dataset hf:set:en:train cannot be loaded: {kind}: {said}"
    assert "offline" in error_line.hint


def test_hub_set_that_is_empty_or_malformed(hub):
    assert "hf:set is empty" in refusal("hf:set").message
    hub.rows = [{"body": "a"}]
    assert refusal("hf:set").message.startswith("hf:set:train:1: has the keys body; legal")


def test_hub_without_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets") as caught:
        texts("hf:set")
    assert caught.value.hint == "pip install 'moetools[hub]'"
