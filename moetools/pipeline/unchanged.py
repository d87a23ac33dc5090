"""Inputs that stay what they were while a run reads them."""

from collections.abc import Sequence
from types import TracebackType

from moetools.checkpoint.reader import Checkpoint
from moetools.errors import CheckpointError, MoetoolsError
from moetools.formats.reader import open_model


class Unchanged:
    """Refuses what was made of inputs that were written again meanwhile; a context around all that reads them.

    Size and time of every file and a sample of every tensor are compared with those at its making. At the end of the
    context a CheckpointError names what changed; it takes the place of any other MoetoolsError, which it explains.

    Args:
        writes: the run writes a checkpoint, which its hint then speaks of.
    """

    def __init__(self, inputs: Sequence[Checkpoint], *, writes: bool = False) -> None:
        self._hint = "run again when nothing writes to it any more"
        self._hint += "; `overwrite` starts a begun output afresh" if writes else ""
        self._seen = [(one, one.stamps(), one.fingerprint()) for one in inputs]

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, MoetoolsError):
            return
        for source, stamps, fingerprint in self._seen:
            if source.stamps() != stamps or open_model(source.path).fingerprint() != fingerprint:
                raise CheckpointError(
                    f"{source.path} changed while it was read: what was made of it would be a mixture of two models",
                    hint=self._hint,
                ) from error
