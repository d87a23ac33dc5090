"""What `--data` accepts, and the documents behind it, streamed.

Legal values: a .txt (one document), .jsonl or .json (one JSON object per line) or .parquet file, a directory of such
files, `hf:dataset[:config][:split]`, or a .safetensors file of token ids; any of them as `name=value` to name the task.
Importing this imports neither torch nor transformers.
"""

import difflib
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetools.errors import DataError, UserError
from moetools.text.documents import Document, read_hub, read_json_lines, read_parquet, read_text
from moetools.text.task_names import RULE, name_fault

__all__ = ["DataSource", "Document", "iter_documents", "parse_data_option"]

TOKENS_SUFFIX = ".safetensors"
_HUB = "hf:"
_NAMED = re.compile(r"([^=/]*)=(.*)", re.DOTALL)
_SPLIT = re.compile(r"(train|test|validation)(\[.*\])?")
_READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".txt": read_text,
    ".jsonl": read_json_lines,
    ".json": read_json_lines,
    ".parquet": read_parquet,
}
# A directory's .json files are as often metadata as data, so they count only when named themselves.
_IN_DIRECTORY = (".txt", ".jsonl", ".parquet")


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
        """The files to read, in order: the file itself, or all .txt, .jsonl and .parquet below a directory, sorted.

        Raises:
            DataError: nothing there, an unknown suffix, or a directory without a legal file.
        """
        path = self.path
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IN_DIRECTORY and p.is_file())
            visible = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            if not visible:
                raise DataError(
                    f"no data in the directory {path}: it has no {', '.join(_IN_DIRECTORY)} file",
                    hint=f"name a file; legal suffixes: {_legal_suffixes()}",
                )
            return visible
        if not path.exists():
            raise _missing(path)
        if path.suffix.lower() not in (*_READERS, TOKENS_SUFFIX):
            raise DataError(
                f"{path}: unknown data format '{path.suffix}'; legal suffixes: {_legal_suffixes()}",
                hint="rename the file if it is one of these, or convert it",
            )
        return [path]


def parse_data_option(values: Sequence[str]) -> list[DataSource]:
    """The sources named by the values of a repeated `--data`, in order, checked to exist; nothing is read yet.

    A value without a name is called after its file stem, directory or dataset.

    Raises:
        UserError: an empty value or two tasks of one name.
        DataError: see `DataSource.files`.
    """
    sources: dict[str, DataSource] = {}
    for value in values:
        source = _parse(value)
        if source.task in sources:
            raise UserError(
                f"two data sets are named '{source.task}': {sources[source.task].location} and {source.location}",
                hint=f"name them: --data NAME={source.location}",
            )
        sources[source.task] = source
    return list(sources.values())


def iter_documents(source: DataSource) -> Generator[Document, None, None]:
    """The documents of a source that is not token ids, one at a time, in the order of its files and lines.

    Raises:
        UserError: a package is missing or a hub dataset cannot be loaded.
        DataError: a missing, empty or malformed file, naming file and line.
    """
    assert not source.is_tokens, f"{source.location} holds token ids, not documents"
    if source.is_hub:
        yield from read_hub(*source.hub())
        return
    for path in source.files():
        yield from _READERS[path.suffix.lower()](path)


def _parse(value: str) -> DataSource:
    # "a=b.txt" may be a file's own name; only what does not exist is taken apart.
    named = None if Path(value).expanduser().exists() else _NAMED.fullmatch(value)
    task, location = named.groups() if named else ("", value)
    fault = name_fault(task) if named else None
    if fault:
        raise UserError(f"--data '{value}': a task cannot be called '{task}': {fault}", hint=f"legal: {RULE}")
    if not location.strip():
        raise UserError(f"--data '{value}' names no data", hint="legal: PATH, NAME=PATH, hf:dataset, NAME=hf:dataset")
    source = DataSource(task=task, location=location)
    default = source.hub()[0].rstrip("/").rpartition("/")[2] if source.is_hub else _path_name(source.path)
    if not source.is_hub:
        source.files()
    return DataSource(task=task or default, location=location)


def _path_name(path: Path) -> str:
    # "." and ".." have no name of their own.
    return path.resolve().name if path.is_dir() else path.stem


def _missing(path: Path) -> DataError:
    parent = path.parent
    if not parent.is_dir():
        return DataError(f"no such data: {path}", hint=f"the directory {parent} does not exist")
    siblings = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    legal = f"legal: a path ending in {_legal_suffixes()}, a directory, or hf:dataset"
    return DataError(f"no such data: {path}", hint=f"did you mean '{parent / close[0]}'?" if close else legal)


def _legal_suffixes() -> str:
    return ", ".join((*_READERS, TOKENS_SUFFIX))
