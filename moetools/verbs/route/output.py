"""The folder that holds several checkpoints and what goes with them: complete, or not there at all."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.output import check_output, check_replaceable
from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.staging import Staging
from moetools.errors import CheckpointError


class FolderWriter:
    """Collects checkpoints and files in a staging folder beside `out` and publishes them in one step.

    Each checkpoint is written into `parts` by a `CheckpointWriter` of its own; a resumed run finds there what an
    interrupted one had finished.

    Raises:
        UserError, CheckpointError: as `CheckpointWriter`.
    """

    def __init__(
        self,
        out: Path,
        *,
        source: Checkpoint,
        plan: Mapping[str, Any],
        expected_bytes: int,
        overwrite: bool,
        resume: bool,
    ) -> None:
        check_output(out, source, overwrite, resume, expected_bytes)
        self._out, self._overwrite = Path(out), overwrite
        self._staging = Staging(out, plan, resume)
        self._published = False
        try:
            # Taking the lock may have brought back an output that an earlier run was about to replace.
            check_replaceable(out, overwrite, resume)
        except BaseException:
            self._staging.release()
            raise
        self.parts = self._staging.scratch
        self.contents = self._staging.contents

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An interrupted run goes on from what it had finished; one that failed would fail again.
        failed = isinstance(error, Exception) and not isinstance(error, CheckpointError)
        if self._published:
            return
        if failed or not any(self.parts.iterdir()):
            self._staging.discard()
        else:
            self._staging.release()

    def write_text(self, name: str, text: str) -> None:
        """Write one file beside the checkpoints, as UTF-8."""
        write_durably(self.contents / name, text.encode())

    def commit(self, names: list[str]) -> Path:
        """Put the finished checkpoints `names` beside the files and everything in the place of `out`."""
        for name in names:
            (self.parts / name).rename(self.contents / name)
        self._staging.publish(self._overwrite)
        self._published = True
        self._staging.discard()
        return self._out
