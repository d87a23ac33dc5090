"""What `--data` accepts, and the documents behind it, streamed.

Legal values: a .txt (one document), .jsonl, .ndjson or .json (one JSON object per line, or one array of them) or
.parquet file, all but the last also compressed (.gz, .zst), a directory of such files, `hf:dataset[:config][:split]`,
or a .safetensors file of token ids; any of them as `name=value` to name the task.
Importing this imports neither torch nor transformers.
"""

import difflib
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from moetools.errors import DataError, UserError
from moetools.text.documents import Reading, check_start, read_hub, read_json, read_parquet, read_text
from moetools.text.foreign import foreign
from moetools.text.records import Document
from moetools.text.task_names import RULE, name_fault

TOKENS_SUFFIX = ".safetensors"
_COMPRESSED = (".gz", ".zst")
_COMPRESSIBLE = (".txt", ".jsonl", ".ndjson", ".json")
_HUB = "hf:"
_NAMED = re.compile(r"([^=/]*)=(.*)", re.DOTALL)
_LEGAL = "PATH, NAME=PATH, hf:dataset, NAME=hf:dataset"
_SPLIT = re.compile(r"(train|test|validation)(\[.*\])?")
_READERS: dict[str, Callable[[Path, str | None], Reading]] = {
    ".txt": read_text,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
}
# A file may be endless, so after this many unusable records and no usable one the rest is not looked at.
_GIVE_UP = 1000
# A directory's .json files are as often metadata as data, so they count only when named themselves.
_IN_DIRECTORY = (".txt", ".jsonl", ".ndjson", ".parquet")

_T = TypeVar("_T")


@dataclass(kw_only=True)
class Skipped:
    """Records that could not be used.

    Attributes:
        strict: refuse the first one instead.
        count: how many there were.
        first: what was wrong with the first of them.
    """

    strict: bool = False
    count: int = 0
    first: DataError | None = None

    def add(self, error: DataError) -> None:
        """Count one, or raise it."""
        if self.strict:
            raise error
        self.count += 1
        self.first = self.first or error


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One task's data.

    Attributes:
        task: name of the task, unique within a run.
        location: a path, or `hf:dataset[:config][:split]`.
    """

    task: str
    location: str

    @property
    def is_hub(self) -> bool:
        """Whether the data is a dataset to load through the datasets package."""
        return self.location.startswith(_HUB)

    @property
    def is_tokens(self) -> bool:
        """Whether the data is token ids already, to be read by `moetools.text.tokens`."""
        return not self.is_hub and self.path.suffix.lower() == TOKENS_SUFFIX and not self.path.is_dir()

    @property
    def path(self) -> Path:
        """The file or directory; meaningless for a hub dataset."""
        return Path(self.location).expanduser()

    def hub(self) -> tuple[str, str | None, str]:
        """(dataset, config, split) of a hub location; the split defaults to "train".

        A single part after the dataset is a config, unless it is train, test or validation, sliced or not.

        Raises:
            UserError: no dataset named.
        """
        name, _, rest = self.location.removeprefix(_HUB).partition(":")
        if not name:
            raise UserError(f"'{self.location}' names no dataset", hint="legal: hf:dataset[:config][:split]")
        if _SPLIT.fullmatch(rest):
            return name, None, rest
        config, _, split = rest.partition(":")
        return name, config or None, split or "train"

    def files(self) -> list[Path]:
        """The files to read, in order: the file itself, or all of legal suffixes but .json below a directory, sorted.

        Raises:
            DataError: nothing there, an unknown suffix, or a directory without a legal file.
        """
        path = self.path
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if format_suffix(p) in _IN_DIRECTORY and p.is_file())
            visible = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            if not visible:
                raise DataError(
                    f"no data in the directory {path}: it has no {', '.join(_IN_DIRECTORY)} file",
                    hint=f"name a file; legal suffixes: {_legal_suffixes()}",
                )
            return visible
        if not path.exists():
            raise _missing(path)
        if format_suffix(path) not in (*_READERS, TOKENS_SUFFIX):
            raise DataError(
                f"{path}: unknown data format '{path.suffix}'; legal suffixes: {_legal_suffixes()}",
                hint="rename the file if it is one of these, or convert it",
            )
        return [path]


def parse_data_option(values: Sequence[str], option: str = "data") -> list[DataSource]:
    """The sources named by the values of a repeated option, in order, checked to exist; nothing is read yet.

    A value without a name is called after its file stem, directory or dataset.

    Raises:
        UserError: an empty value or two tasks of one name.
        DataError: see `DataSource.files`.
    """
    sources: dict[str, DataSource] = {}
    for value in values:
        source = _parse(value, option)
        if source.task in sources:
            raise UserError(
                f"two data sets are named '{source.task}': {sources[source.task].location} and {source.location}",
                hint=f"name them: `{option}=NAME={source.location}`",
            )
        sources[source.task] = source
    return list(sources.values())


def iter_documents(
    source: DataSource, *, column: str | None = None, skipped: Skipped | None = None
) -> Generator[Document, None, None]:
    """The documents of a source that is not token ids, one at a time, in the order of its files and lines.

    Records that cannot be used are left out, and counted in `skipped`.

    Raises:
        UserError: a package is missing.
        DataError: a file that is missing, unreadable, empty or without one usable record; a hub dataset likewise.
    """
    assert not source.is_tokens, f"{source.location} holds token ids, not documents"
    tally = skipped or Skipped()
    if source.is_hub:
        yield from usable(read_hub(*source.hub(), column), source.location, tally)
        return
    for path in source.files():
        check_start(path)
        yield from usable(_READERS[format_suffix(path)](path, column), str(path), tally)


def usable(items: Iterable[_T | DataError], place: str, skipped: Skipped) -> Iterator[_T]:
    """The items that are no errors; the errors are counted.

    Raises:
        DataError: there is not one, or none among the first 1,000.
    """
    found = bad = 0
    first: DataError | None = None
    for item in items:
        if not isinstance(item, DataError):
            found += 1
            yield item
            continue
        skipped.add(item)
        bad, first = bad + 1, first or item
        if not found and bad == _GIVE_UP:
            break
    if found:
        return
    if first is None:
        raise DataError(f"{place} is empty: it holds no document", hint="remove it from `data`, or write it again")
    if bad == 1:
        raise first
    which = f"the first {bad:,} records" if bad == _GIVE_UP else f"the {bad:,} records"
    raise DataError(f"{place}: none of {which} can be used; the first: {first.message}", hint=first.hint)


def format_suffix(path: Path) -> str:
    """The suffix that says what is in a file, in lower case, without that of its compression."""
    return _uncompressed(path).suffix.lower()


def _uncompressed(path: Path) -> Path:
    inner = path.with_suffix("")
    compressed = path.suffix.lower() in _COMPRESSED and inner.suffix.lower() in _COMPRESSIBLE
    return inner if compressed else path


def _parse(value: str, option: str) -> DataSource:
    # "a=b.txt" may be a file's own name; only what does not exist is taken apart.
    with foreign(f"`{option}={value[:40]}` is not a path", f"legal: {_LEGAL}"):
        named = None if Path(value).expanduser().exists() else _NAMED.fullmatch(value)
    task, location = named.groups() if named else ("", value)
    fault = name_fault(task) if named else None
    if fault:
        raise UserError(f"`{option}={value}`: a task cannot be called '{task}': {fault}", hint=f"legal: {RULE}")
    if not location.strip():
        raise UserError(f"`{option}={value}` names no data", hint=f"legal: {_LEGAL}")
    source = DataSource(task=task, location=location)
    default = source.hub()[0].rstrip("/").rpartition("/")[2] if source.is_hub else _path_name(source.path)
    if not source.is_hub:
        source.files()
    return DataSource(task=task or default, location=location)


def _path_name(path: Path) -> str:
    # "." and ".." have no name of their own.
    return path.resolve().name if path.is_dir() else _uncompressed(path).stem


def _missing(path: Path) -> DataError:
    parent = path.parent
    if re.match(r"https?:/", str(path)):
        return DataError(f"no such data: {path}", hint="nothing is downloaded; fetch the file first, or use hf:dataset")
    if not parent.is_dir():
        return DataError(f"no such data: {path}", hint=f"the directory {parent} does not exist")
    siblings = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    legal = f"legal: a path ending in {_legal_suffixes()}, a directory, or hf:dataset"
    return DataError(f"no such data: {path}", hint=f"did you mean '{parent / close[0]}'?" if close else legal)


def _legal_suffixes() -> str:
    also = f"{', '.join(_COMPRESSIBLE)} also with {' or '.join(_COMPRESSED)} behind"
    return f"{', '.join((*_READERS, TOKENS_SUFFIX))}; {also}"
