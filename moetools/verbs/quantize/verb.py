"""Quantize a checkpoint, or write the plain one that a quantized checkpoint stands for."""

from pathlib import Path

from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.pipeline.carry_out import carry_out
from moetools.pipeline.options import Writing
from moetools.pipeline.work import Work
from moetools.text.options import DataOptions
from moetools.verbs.quantize.expanded import ExpandedModel
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.quantize.report import QuantizationReport
from moetools.verbs.quantize.work import QuantizedModel


def quantize(
    model: Path,
    out: Path,
    options: QuantizeOptions,
    text: DataOptions,
    forward: ForwardOptions,
    writing: Writing,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> QuantizationReport:
    """Write a checkpoint whose weights take fewer bits, or with `expand` the plain one that a quantized one stands for.

    Args:
        command: the command line, for the report.

    Raises:
        MoetoolsError: see `QuantizedModel`, `ExpandedModel` and `carry_out`; nothing is left in place of `out`.
    """
    options.check()
    work: Work[QuantizationReport]
    if options.expand:
        work = ExpandedModel(model, forward, command=command, progress=progress)
    else:
        work = QuantizedModel(model, text, forward, options, command=command, progress=progress)
    return carry_out(work, out, writing)
