"""Whether packed weights stay packed, decided before any weight is read."""

import logging

from moetools.checkpoint.reader import Checkpoint
from moetools.errors import UserError
from moetools.formats.kept import keeping_problem
from moetools.formats.reader import PackedCheckpoint
from moetools.plugins import unknown_name
from moetools.verbs.output_format_option import OUTPUT_FORMATS

_LOG = logging.getLogger(__name__)


def refit_words(refit: str) -> str:
    """What a refit changes."""
    return f"`refit={refit}` solves for new weights"


def keeps_packed(source: Checkpoint, asked: str | None, *, changes: str, experts: int) -> PackedCheckpoint | None:
    """The input, if its packed tensors go into the output as they lie on disk.

    Args:
        asked: the option `output_format`; None if it was not given.
        changes: what makes new weights, so that nothing is left to keep; empty where only experts are chosen.
        experts: how many a layer has.

    Raises:
        UserError: an unknown format, or `same` where it cannot be had.
    """
    if asked not in (None, *OUTPUT_FORMATS):
        raise unknown_name("output format", str(asked), list(OUTPUT_FORMATS))
    if not isinstance(source, PackedCheckpoint) or asked == "bf16":
        return None
    problem = changes or keeping_problem(source, experts)
    if not problem:
        return source
    if asked == "same":
        raise UserError(
            f"`output_format=same`: {problem}",
            hint="`output_format=bf16` decodes the weights; moetools quantize packs the result again",
        )
    if not changes:
        _LOG.warning("packed weights are decoded: %s", problem)
    return None
