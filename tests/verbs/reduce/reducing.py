"""Both reducing verbs by one call: the number of experts has one name, and settings of all kinds stand side by side."""

from pathlib import Path
from typing import Any

from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.verbs.reduce.options import MergeOptions, PruneOptions
from moetools.verbs.reduce.report import ReduceReport
from moetools.verbs.reduce.verb import merge_experts, prune_experts

CPU = ForwardOptions(device="cpu")
_WRITING = ("overwrite", "resume", "dry_run", "verify")


def reduce(
    verb: str, model: Path, out: Path, text: DataOptions | None, forward: ForwardOptions = CPU, **settings: Any
) -> ReduceReport:
    """`target` is the number of experts, by whatever name the verb has for it."""
    writing = Writing(**{name: settings.pop(name) for name in _WRITING if name in settings})
    given, text = (forward, writing), text or DataOptions()
    if verb == "prune":
        asked = PruneOptions(keep=settings.pop("target", None), **settings)
        return prune_experts(model, out, asked, text, *given, command="moetools test")
    return merge_experts(
        model, out, MergeOptions(to=settings.pop("target", None), **settings), text, *given, command="moetools test"
    )
