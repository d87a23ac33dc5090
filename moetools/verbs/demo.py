"""The whole journey on the embedded model: copy it out, measure once, prune, merge, evaluate side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetools.architectures.base import find_architecture
from moetools.checkpoint.reader import open_checkpoint
from moetools.demo import InstalledDemo, install_demo
from moetools.forward.calibrate import collect_statistics
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.options import Writing
from moetools.pipeline.table import Table
from moetools.text.budget import Samples
from moetools.text.options import DataOptions, load_tokens
from moetools.verbs.demo_options import DemoOptions
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.report import Evaluation
from moetools.verbs.evaluate.verb import evaluate
from moetools.verbs.inspect.summary import ModelSummary
from moetools.verbs.inspect.verb import inspect
from moetools.verbs.reduce.options import MergeOptions, PruneOptions
from moetools.verbs.reduce.report import ReduceReport
from moetools.verbs.reduce.verb import merge_experts, prune_experts

_SEQ_LEN = 256
_QUICK_SAMPLES = 8
_STATISTICS = ("load", "reap", "max_activation")


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """What the demo made and measured.

    Attributes:
        directory: holds model/, data/, statistics.safetensors, pruned/ and merged/.
    """

    directory: str
    model: ModelSummary
    pruned: ReduceReport
    merged: ReduceReport
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "directory": self.directory,
            "model": self.model.to_json(),
            "pruned": self.pruned.to_json(),
            "merged": self.merged.to_json(),
            "evaluation": self.evaluation.to_json(),
        }

    def tables(self) -> list[Table]:
        """The original and both results side by side."""
        return self.evaluation.tables()[:1]


def demo(
    directory: Path, options: DemoOptions, forward: ForwardOptions, *, progress: Progress | None = None
) -> DemoReport:
    """Put the embedded model and its data into `directory`, halve its experts in two ways, and compare.

    Raises:
        UserError: `directory` already holds a demo.
    """
    directory = Path(directory)
    installed = install_demo(directory)
    samples: Samples = _QUICK_SAMPLES if options.quick else "all"
    calibration = _text(installed, "calibration", samples)
    half = _calibrate(installed.model, calibration, forward, directory, progress) // 2
    results = {
        "pruned": prune_experts(
            installed.model,
            directory / "pruned",
            PruneOptions(method="reap", keep=half, stats=directory / "statistics.safetensors"),
            calibration,
            forward,
            Writing(),
            command=f"moetools prune-experts model pruned --keep {half} --method reap --stats statistics.safetensors",
            progress=progress,
        ),
        "merged": merge_experts(
            installed.model,
            directory / "merged",
            MergeOptions(method="joint", to=half),
            calibration,
            forward,
            Writing(),
            command=f"moetools merge-experts model merged --to {half} --method joint --data data/*/calibration.jsonl",
            progress=progress,
        ),
    }
    evaluation = evaluate(
        [directory / verb for verb in results],
        EvaluateOptions(reference=installed.model),
        _text(installed, "test", samples),
        forward,
        progress=progress,
    )
    return DemoReport(
        directory=str(directory),
        model=inspect(installed.model),
        pruned=results["pruned"],
        merged=results["merged"],
        evaluation=evaluation,
    )


def _text(installed: InstalledDemo, split: str, samples: Samples) -> DataOptions:
    files = sorted(installed.data.glob(f"*/{split}.jsonl"))
    return DataOptions(data=[f"{file.parent.name}={file}" for file in files], seq_len=_SEQ_LEN, samples=samples)


def _calibrate(
    path: Path, data: DataOptions, forward: ForwardOptions, directory: Path, progress: Progress | None
) -> int:
    """Measure what pruning needs in one pass and save it, for further runs too; returns the number of experts."""
    checkpoint = open_checkpoint(path)
    model = StreamedModel(checkpoint, forward, progress=progress)
    tokens = load_tokens(data, checkpoint, model.vocab_size)
    collect_statistics(model, tokens, _STATISTICS).save(directory / "statistics.safetensors")
    experts = find_architecture(checkpoint.config).num_experts(checkpoint.config)
    assert experts is not None
    return experts
