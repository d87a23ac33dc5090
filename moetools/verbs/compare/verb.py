"""Any number of checkpoints side by side: size, experts, bits, loss, and which of them no other one beats."""

from collections.abc import Sequence
from pathlib import Path

from moetools.architectures.base import find_architecture
from moetools.arguments import paths
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.forward.evaluate import measure_size
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.pipeline.plots import check_shown, write_shown
from moetools.text.options import DataOptions
from moetools.verbs.compare.options import CompareOptions
from moetools.verbs.compare.page import comparison_page
from moetools.verbs.compare.report import ComparedModel, Comparison, with_pareto
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.report import EvaluatedModel
from moetools.verbs.evaluate.verb import distinct_models, evaluate, model_names


def compare(
    models: Sequence[Path],
    options: CompareOptions,
    text: DataOptions,
    forward: ForwardOptions,
    *,
    progress: Progress | None = None,
) -> Comparison:
    """Measure all models as `evaluate` does, or their sizes alone where there is no text.

    Raises:
        UserError: a page that cannot be written; see `evaluate` for all else that is refused.
        CheckpointError, UnsupportedModelError, DataError, VerificationError: see `evaluate`.
    """
    found = distinct_models(models, options.reference)
    if options.html is not None or options.plots is not None:
        reads = {f"model {number}": path for number, path in enumerate(found)} | dict(text.paths())
        check_shown(options.html, options.plots, {**reads, **dict(paths(options, "reads"))})
    comparison = _measured(models, options, text, forward, progress) if text.data else _weighed(found, options)
    write_shown(options.html, options.plots, lambda: comparison_page(comparison))
    return comparison


def _measured(
    models: Sequence[Path],
    options: CompareOptions,
    text: DataOptions,
    forward: ForwardOptions,
    progress: Progress | None,
) -> Comparison:
    measured = evaluate(models, EvaluateOptions(reference=options.reference), text, forward, progress=progress)
    rows = with_pareto([_row(model) for model in measured.models])
    return Comparison(models=rows, data=measured.data, num_tokens=measured.num_tokens)


def _row(model: EvaluatedModel) -> ComparedModel:
    metrics = model.metrics
    return ComparedModel(
        name=model.name,
        path=model.path,
        is_reference=model.is_reference,
        size=metrics.size,
        format=_format(model.path),
        kl=None if metrics.agreement is None else metrics.agreement.kl,
        perplexity=metrics.perplexity,
        tasks={task: found.perplexity for task, found in metrics.tasks.items()},
    )


def _weighed(found: Sequence[Path], options: CompareOptions) -> Comparison:
    """Sizes, from headers alone."""
    rows = []
    for name, path in zip(model_names(found), found, strict=True):
        checkpoint = open_model(path)
        size = measure_size(checkpoint, find_architecture(checkpoint.config, dense=True))
        original = options.reference is not None and path == options.reference
        rows.append(
            ComparedModel(name=name, path=path, is_reference=original, size=size, format=_format(path), tasks={})
        )
    return Comparison(models=tuple(rows), data=None, num_tokens=0)


def _format(path: Path) -> str:
    checkpoint = open_model(path)
    return checkpoint.format_name if isinstance(checkpoint, PackedCheckpoint) else "plain"
