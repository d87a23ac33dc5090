"""Documents out of one file or hub dataset: a reader per format, all streaming.

A reader yields documents, and in place of a record that cannot be used the error that says why, naming file and line;
it raises where the whole file cannot be read. Nothing here imports torch or transformers, and pyarrow, datasets and
zstandard only when a source needs them.
"""

import gzip
import importlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from moetools.errors import DataError
from moetools.text.foreign import cause, drawn, foreign, optional_module
from moetools.text.records import COLUMNS, PAIR, SHAPE_HINT, Document, document_of, illegal_record, json_type

_UTF8_BOM = b"\xef\xbb\xbf"
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_TEXT_BYTES = 1 << 22
_CHECK_FILE = "check the path and its permissions, or write the file again"

# How files begin that are not what their name says: what they are, the suffix that would be right, what to do.
_STARTS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "", "run 'git lfs pull' in its folder"),
    b"\x1f\x8b": ("compressed with gzip", ".gz", "rename it: .gz behind its name"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstandard", ".zst", "rename it: .zst behind its name"),
    b"PAR1": ("a parquet file", ".parquet", "rename it to end in .parquet"),
    b"PK\x03\x04": ("a zip archive", "", "unpack it"),
}

Reading = Iterator[Document | DataError]


def read_text(path: Path, _column: str | None = None) -> Reading:
    """The file as one document, one of over 4 MiB as several of about that size, cut behind a line's end.

    A byte order mark is dropped, line endings are kept.

    Raises:
        DataError: unreadable, or not UTF-8.
    """
    offset, line, raw = 0, 1, b""
    with open_binary(path) as file:
        while True:
            offset, line = offset + len(raw), line + raw.count(b"\n")
            with foreign(f"{path} cannot be read", _CHECK_FILE):
                raw = file.read(_TEXT_BYTES)
                raw += file.readline() if len(raw) == _TEXT_BYTES else b""
            if not raw:
                return
            bom = len(_UTF8_BOM) if offset == 0 and raw.startswith(_UTF8_BOM) else 0
            text = _decode(raw[bom:], path, line, offset + bom)
            if text.strip():
                yield Document(text=text, where=str(path))


def read_json(path: Path, column: str | None = None) -> Reading:
    """One document per line, or per element where the file is one array.

    Raises:
        DataError: unreadable, or an array that is not JSON.
    """
    for where, record in iter_json_objects(path):
        yield record if isinstance(record, DataError) else _document(record, where, column)


def read_parquet(path: Path, column: str | None = None) -> Reading:
    """One document per row, read in batches of 256 rows and only the columns that matter.

    Raises:
        UserError: pyarrow is not installed.
        DataError: not a parquet file, or no legal column.
    """
    parquet = optional_module("pyarrow.parquet", install="moetools[parquet]", what=f"reading {path}")
    failure = f"{path} cannot be read as parquet", "write the file again"
    with foreign(*failure):
        file = parquet.ParquetFile(path)
    with file:
        names = file.schema_arrow.names
        wanted = COLUMNS if column is None else (column, *PAIR) if column in PAIR else (column,)
        if not any(name in wanted for name in names):
            raise illegal_record(str(path), f"has the columns {', '.join(names) or '(none)'}")
        columns = [name for name in names if name in wanted or name in ("tools", "response_format")]
        batches = file.iter_batches(batch_size=256, columns=columns)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, record in enumerate(drawn(rows, *failure), start=1):
            yield _document(record, f"{path}:{number}", column)


def read_hub(name: str, config: str | None, split: str, column: str | None = None) -> Reading:
    """One document per row of a dataset of the Hugging Face hub (or a local dataset folder), streamed where possible.

    Raises:
        UserError: the datasets package is not installed.
        DataError: the dataset, config or split cannot be loaded.
    """
    datasets = optional_module("datasets", install="moetools[hub]", what=f"hf:{name}")
    # datasets streams neither slices ("train[:100]") nor sets that are only in the local cache.
    offline = any(os.environ.get(key, "0").upper() in ("1", "TRUE", "YES", "ON") for key in _OFFLINE)
    streaming = "[" not in split and not offline
    location = ":".join(part for part in (f"hf:{name}", config, split) if part)
    failure = (
        f"the dataset {location} cannot be loaded",
        "check name, config and split (hf:dataset[:config][:split]); offline, download it first or use a file",
    )
    with foreign(*failure):
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
    for number, record in enumerate(drawn(rows, *failure), start=1):
        yield _document(record, f"{location}:{number}", column)


def iter_json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """("file:line", object, or why there is none) for every line that is not blank, or element of one array.

    Raises:
        DataError: unreadable, or an array that is not JSON.
    """
    found, offset = False, 0
    with open_binary(path) as file:
        for number, raw in enumerate(drawn(file, f"{path} cannot be read", _CHECK_FILE), start=1):
            # Files that were joined have a byte order mark in the middle.
            bom = len(_UTF8_BOM) if raw.startswith(_UTF8_BOM) else 0
            if not found and raw[bom:].lstrip().startswith(b"["):
                yield from _array(path)
                return
            where = f"{path}:{number}"
            try:
                line = _decode(raw[bom:], path, number, offset + bom).strip()
                if line:
                    yield where, _json_object(line, where)
            except DataError as error:
                line = "not blank"
                yield where, error
            found = found or bool(line)
            offset += len(raw)


def check_start(path: Path) -> None:
    """Refuse a file that is something else than its name says.

    Raises:
        DataError: saying what it is, or that it cannot be read.
    """
    with foreign(f"{path} cannot be read", _CHECK_FILE), path.open("rb") as file:
        start = file.read(max(map(len, _STARTS)))
    for begin, (kind, suffix, hint) in _STARTS.items():
        if start.startswith(begin) and path.suffix.lower() != suffix:
            raise DataError(f"{path} is {kind}", hint=hint)


def open_binary(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed if its name ends in .gz or .zst.

    Raises:
        UserError: no package for zstandard is installed.
        DataError: it cannot be opened.
    """
    with foreign(f"{path} cannot be read", _CHECK_FILE):
        if path.suffix.lower() == ".gz":
            return io.BufferedReader(gzip.open(path))
        if path.suffix.lower() != ".zst":
            return path.open("rb")
        if sys.version_info >= (3, 14):
            return importlib.import_module("compression.zstd").open(path)
        zstandard = optional_module("zstandard", install="zstandard", what=f"reading {path}")
        # A file may be of several frames, of which only the first is read by default.
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(reader)


def _document(record: Mapping[str, Any], where: str, column: str | None) -> Document | DataError:
    try:
        return document_of(record, where, column)
    except DataError as error:
        return error


def _array(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """The elements of a file that is one array; such a file is read whole."""
    with (
        foreign(f"{path}:1: not JSON", "write one JSON object per line, or one array of objects"),
        open_binary(path) as file,
    ):
        elements = json.loads(file.read().decode("utf-8-sig"))
    for number, element in enumerate(elements, start=1):
        where = f"{path}:{number}"
        yield where, element if isinstance(element, dict) else _no_object(element, where)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    # Besides malformed JSON (a ValueError), json refuses numbers of over 4,300 digits and nesting over its stack.
    except (ValueError, RecursionError) as error:
        hint = "write one JSON object per line"
        if line == "{":
            hint = "the file is one indented JSON document; convert it with: jq -c . FILE > FILE.jsonl"
        raise DataError(f"{where}: not JSON: {cause(error).partition(': ')[2]}", hint=hint) from error
    if not isinstance(record, dict):
        raise _no_object(record, where)
    return record


def _no_object(value: object, where: str) -> DataError:
    return DataError(f"{where}: this is {json_type(value)}, not an object", hint=SHAPE_HINT)


def _decode(raw: bytes, path: Path, line: int, offset: int) -> str:
    """UTF-8 text that begins in the given line, at the given byte."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        at = line + raw[: error.start].count(b"\n")
        byte, position = raw[error.start], offset + error.start
        raise DataError(
            f"{path}:{at}: not UTF-8: byte 0x{byte:02x} at offset {position}",
            hint="convert it with: iconv -f ENCODING -t UTF-8 (UTF-16 files start with 0xff 0xfe)",
        ) from error
