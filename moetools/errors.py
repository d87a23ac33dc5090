"""Errors that a user can act on: what failed, the value received, what is legal, and a hint.

The command line turns every `MoetoolsError` into one line on stderr plus a `hint:` line and exits with `exit_code`.
Arguments stand in backticks, `name` or `name=value`; the command line writes them as its options.
Anything else that is raised is a bug of ours and keeps its traceback.
"""

from typing import Any, ClassVar


class MoetoolsError(Exception):
    """Base of all errors that the user, not we, can fix.

    Attributes:
        message: one sentence that names the value received and what is legal.
        hint: what to do next; empty when there is nothing useful to say.
        exit_code: 1 failed, 2 bad usage, 3 verification or gate failed.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(MoetoolsError):
    """An option or argument that cannot be used: wrong value, unknown name, impossible combination."""

    exit_code = 2


class CheckpointError(MoetoolsError):
    """A checkpoint that is missing, corrupt, truncated, unsafe, or cannot be written."""


class UnsupportedModelError(MoetoolsError):
    """A checkpoint that is intact but not a Mixture-of-Experts model this version can handle."""


class DataError(MoetoolsError):
    """Text or token data that is missing, empty or malformed; the message names file and line."""


class StatisticsError(MoetoolsError):
    """Saved statistics that are stale, incomplete, or belong to another model, tokenizer or data set."""


class VerificationError(MoetoolsError):
    """A written checkpoint that does not load back as it was meant."""

    exit_code = 3


class GateError(MoetoolsError):
    """An evaluation metric that misses a bound.

    Attributes:
        result: the evaluation, which is what one needs then.
    """

    exit_code = 3

    def __init__(self, message: str, *, result: Any, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.result = result
