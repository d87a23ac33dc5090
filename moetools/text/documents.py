"""Documents out of one file or hub dataset: a reader per format, all streaming, all naming file and line on refusal.

A record (a JSON object, a parquet row, a row of a hub dataset) holds exactly one of `text`, `messages`, or `prompt`
with `completion`; other keys are ignored. Nothing here imports torch or transformers, and pyarrow and datasets only
when a source needs them.
"""

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from moetools.errors import DataError, UserError

_UTF8_BOM = b"\xef\xbb\xbf"
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_COLUMNS = ("text", "messages", "prompt", "completion")
_LEGAL = "'text' | 'messages' | 'prompt' with 'completion'"
_SHAPE_HINT = (
    'write {"text": "..."}, {"messages": [{"role": "user", "content": "..."}]} '
    'or {"prompt": "...", "completion": "..."}'
)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document: either plain text or a chat, never both.

    Attributes:
        text: the text; a prompt and its completion are joined without anything between them.
        messages: a chat, each message with at least `role` and `content`.
        where: "file:line" (a row number for parquet and hub datasets, the bare file for .txt).
    """

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    where: str


def read_text(path: Path) -> Iterator[Document]:
    """The whole file as one document; a byte order mark is dropped, line endings are kept.

    Raises:
        DataError: unreadable, not UTF-8, or nothing but white space.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    text = _decode(raw.removeprefix(_UTF8_BOM), path, line=None, offset=len(raw) - len(raw.removeprefix(_UTF8_BOM)))
    if not text.strip():
        raise empty_file(path)
    yield Document(text=text, where=str(path))


def read_json_lines(path: Path) -> Iterator[Document]:
    """One document per line.

    Raises:
        DataError: see `iter_json_objects`, and a line that is not a legal record.
    """
    for where, record in iter_json_objects(path):
        yield document_of(record, where)


def read_parquet(path: Path) -> Iterator[Document]:
    """One document per row, read in batches of 256 rows and only the columns that matter.

    Raises:
        UserError: pyarrow is not installed.
        DataError: not a parquet file, no legal column, no rows, or a row that is not a legal record.
    """
    parquet = optional_module("pyarrow.parquet", extra="parquet", what=f"reading {path}")
    arrow_error = importlib.import_module("pyarrow").ArrowException
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
            if not columns:
                raise _illegal(str(path), f"has the columns {', '.join(file.schema_arrow.names) or '(none)'}")
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield document_of(record, f"{path}:{row}")
    except (arrow_error, OSError) as error:
        raise DataError(
            f"{path} cannot be read as parquet: {_first_line(error)}", hint="write the file again"
        ) from error
    if not row:
        raise empty_file(path)


def read_hub(name: str, config: str | None, split: str) -> Iterator[Document]:
    """One document per row of a dataset of the Hugging Face hub (or a local dataset folder), streamed where possible.

    Raises:
        UserError: the datasets package is not installed, or the dataset, config or split cannot be loaded.
        DataError: no rows, or a row that is not a legal record.
    """
    datasets = optional_module("datasets", extra="hub", what=f"hf:{name}")
    # datasets streams neither slices ("train[:100]") nor sets that are only in the local cache.
    offline = any(os.environ.get(key, "0").upper() in ("1", "TRUE", "YES", "ON") for key in _OFFLINE)
    streaming = "[" not in split and not offline
    location = ":".join(part for part in (f"hf:{name}", config, split) if part)
    row = 0
    try:
        for record in datasets.load_dataset(name, config, split=split, streaming=streaming):
            row += 1
            yield document_of(record, f"{location}:{row}")
    # Wrong names and slices are ValueErrors, refused scripts RuntimeErrors, everything about the network OSErrors.
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the dataset {location} cannot be loaded: {_first_line(error)}",
            hint="check name, config and split (hf:dataset[:config][:split]); offline, download it first or use a file",
        ) from error
    if not row:
        raise DataError(f"the dataset {location} is empty", hint="name another split: hf:dataset:config:split")


def iter_json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) for every line that is not blank; a byte order mark is tolerated.

    Raises:
        DataError: unreadable, not UTF-8, a line that is not a JSON object, or no object at all.
    """
    found = False
    offset = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                bom = len(_UTF8_BOM) if number == 1 and raw.startswith(_UTF8_BOM) else 0
                line = _decode(raw[bom:], path, line=number, offset=offset + bom).strip()
                offset += len(raw)
                if line:
                    found = True
                    yield f"{path}:{number}", _json_object(line, f"{path}:{number}")
    except OSError as error:
        raise _unreadable(path, error) from error
    if not found:
        raise empty_file(path)


def document_of(record: Mapping[str, Any], where: str) -> Document:
    """The document a record holds.

    Raises:
        DataError: none or several of the legal keys, or a value of the wrong type.
    """
    # Tables have every column in every row, so null means absent.
    present = {key for key in _COLUMNS if record.get(key) is not None}
    pair = {"prompt", "completion"} <= present
    forms = [
        form
        for form, there in (("text", "text" in present), ("messages", "messages" in present), ("p+c", pair))
        if there
    ]
    if len(forms) > 1:
        raise _illegal(where, f"has {' and '.join(key for key in _COLUMNS if key in present)}")
    if not forms:
        nulls = [key for key in _COLUMNS if key in record and key not in present]
        raise _illegal(where, f"has null in {nulls[0]!r}" if nulls else f"has the keys {', '.join(record) or '(none)'}")
    if forms == ["messages"]:
        return Document(messages=_messages(record["messages"], where), where=where)
    keys = ("text",) if forms == ["text"] else ("prompt", "completion")
    return Document(text="".join(text_field(record, key, where) for key in keys), where=where)


def text_field(record: Mapping[str, Any], key: str, where: str) -> str:
    """`record[key]`, which has to be there and be a string that UTF-8 can encode.

    Raises:
        DataError: missing, another type, or half of a surrogate pair in it.
    """
    value = record.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {_json_type(value)}, not a string", hint=f"write '{key}' as one string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {key!r} has half of a surrogate pair at character {error.start}, which is not text",
                hint="replace escapes such as \\ud83d that lack their second half",
            ) from error
    return value


def optional_module(name: str, *, extra: str, what: str) -> ModuleType:
    """Import a package that only an extra of ours installs.

    Raises:
        UserError: it is not installed; the hint is the pip command.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise UserError(f"{what} needs the package {package}", hint=f"pip install 'moetools[{extra}]'") from error


def empty_file(path: Path) -> DataError:
    """The error for a file that holds no document."""
    return DataError(f"{path} is empty: it holds no document", hint="remove it from --data, or write it again")


def _messages(value: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        received = "an empty list" if value == [] else _json_type(value)
        raise DataError(f"{where}: 'messages' is {received}, not a list of messages", hint=_SHAPE_HINT)
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise DataError(f"{where}: message {number} is {_json_type(message)}, not an object", hint=_SHAPE_HINT)
        for key in ("role", "content"):
            text_field(message, key, f"{where}: message {number}")
    return value


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    # Besides malformed JSON (a ValueError), json refuses numbers of over 4,300 digits and nesting over its stack.
    except (ValueError, RecursionError) as error:
        hint = "write one JSON object per line"
        if line in ("[", "{"):
            hint = "the file is one indented JSON document; convert it with: jq -c '.[]' FILE > FILE.jsonl"
        raise DataError(f"{where}: not JSON: {_first_line(error)}", hint=hint) from error
    if not isinstance(record, dict):
        hint = "jq -c '.[]' FILE > FILE.jsonl makes lines of an array" if isinstance(record, list) else _SHAPE_HINT
        raise DataError(f"{where}: the line is {_json_type(record)}, not an object", hint=hint)
    return record


def _decode(raw: bytes, path: Path, *, line: int | None, offset: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        at = raw[: error.start].count(b"\n") + 1 if line is None else line
        byte, position = raw[error.start], offset + error.start
        raise DataError(
            f"{path}:{at}: not UTF-8: byte 0x{byte:02x} at offset {position}",
            hint="convert it with: iconv -f ENCODING -t UTF-8 (UTF-16 files start with 0xff 0xfe)",
        ) from error


def _illegal(where: str, received: str) -> DataError:
    return DataError(f"{where}: {received}; legal is exactly one of {_LEGAL}", hint=_SHAPE_HINT)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}", hint="check the path and its permissions")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _json_type(value: object) -> str:
    names = {
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "an array",
        dict: "an object",
    }
    return "null or missing" if value is None else names.get(type(value), type(value).__name__)
