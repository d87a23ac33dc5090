"""The record of a training: one JSON object per line."""

import json
from collections.abc import Mapping
from pathlib import Path

from moetools.forward.progress import Progress


class Record:
    """The JSONL file of a run, written by the first process alone."""

    def __init__(self, file: Path, progress: Progress, *, writes: bool) -> None:
        self._file, self._progress, self._writes = file, progress, writes

    def begin(self, step: int) -> None:
        """Keep the lines up to `step`, which a resumed run goes on from; 0 keeps none."""
        if not self._writes:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lines = self._file.read_text().splitlines(keepends=True) if step and self._file.exists() else []
        self._file.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))

    def add(self, line: Mapping[str, float]) -> None:
        if not self._writes:
            return
        with self._file.open("a") as stream:
            stream.write(json.dumps(dict(line)) + "\n")

    def advance(self, tokens: int) -> None:
        self._progress.advance(tokens)
