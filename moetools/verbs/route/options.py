"""What is asked of `route-tasks`, and what can be refused before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from moetools.arguments import DATA, OUTPUT, option
from moetools.errors import UserError
from moetools.plugins import plugin_names, unknown_name
from moetools.text.task_names import folder_fault
from moetools.verbs.mtp_option import mtp_option
from moetools.verbs.output_format_option import output_format_option
from moetools.verbs.plots_option import plots_option

if TYPE_CHECKING:
    from moetools.architectures.base import Architecture
    from moetools.routing.routing_level import RoutingLevel

SCORES = tuple(plugin_names("moetools.methods.route"))
REFITS = ("joint", "none")
POOLS = ("mean-logits", "mean-probs", "seq-topk")
LEVELS = ("token", "sentence", "sequence", "task")
CLASSIFIERS = ("ngrams", "router", "none")
_LEVEL, _PROMPT = "Routing level", "Task by prompt"


@dataclass(frozen=True, kw_only=True)
class RouteOptions:
    """What is asked of `route-tasks`."""

    keep: int | None = option(None, "Experts of a task in every layer.", metavar="N")
    top_p: float | None = option(
        None,
        "Instead of `keep`: as many experts as it takes to keep this part of a task's score in every layer.",
        metavar="P",
    )
    score: str = option(
        "output",
        f"What makes an expert worth keeping for a task: {', '.join(SCORES)}.",
        metavar="NAME",
        choices=lambda: SCORES,
    )
    union: list[str] = option([], "One more checkpoint for several tasks, or all; may be repeated.", metavar="A+B")
    refit: str | None = option(
        None,
        "joint: solve the down projections anew on the task's text; none: leave them. joint if not given, where every "
        "task has enough text for it.",
        metavar="HOW",
        choices=lambda: REFITS,
    )
    tune_router: int = option(
        0,
        "Train the tasks' routers towards the full model; both models must fit in memory.",
        metavar="STEPS",
    )
    test: list[str] = option(
        [],
        "Held-out text of every task; if not given, the last fifth of each task's text is held out.",
        metavar="NAME=PATH",
        panel=DATA,
    )
    level: list[str] = option(
        [],
        "Also measure the full model with experts chosen per sentence or per sequence; may be repeated.",
        metavar="UNIT",
        panel=_LEVEL,
        choices=lambda: LEVELS,
    )
    pool: list[str] = option(
        [],
        "How a unit's scores are pooled: mean-logits, mean-probs, seq-topk; all three if not given.",
        metavar="RULE",
        panel=_LEVEL,
        choices=lambda: POOLS,
    )
    classifier: str = option(
        "ngrams",
        "How a prompt's task is found: ngrams (of token ids), router (probabilities over the prefix), none.",
        metavar="KIND",
        panel=_PROMPT,
        choices=lambda: CLASSIFIERS,
    )
    prefix: int = option(64, "Tokens of the prompt that count.", metavar="N", panel=_PROMPT)
    threshold: float = option(
        0.8, "Prompts that are less sure of their task than this use all experts.", metavar="P", panel=_PROMPT
    )
    mtp: str | None = mtp_option()
    output_format: str | None = output_format_option()
    report: bool = option(True, "Write report.html with the plots.", flags="--report/--no-report", panel=OUTPUT)
    plots: Path | None = plots_option("report.html")

    def check(self, arch: Architecture, config: Mapping[str, Any]) -> None:
        """Refuse what cannot work with this model.

        Raises:
            UserError: naming the option, what it got and what is legal.
        """
        if (self.keep is None) == (self.top_p is None):
            raise UserError("give either `keep` or `top_p`", hint="for example `keep=4`, or `top_p=0.9`")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"`top_p={self.top_p:g}` is not above 0 and at most 1", hint="0.9 keeps 90 % of the score")
        if self.keep is not None:
            top_k = arch.top_k(config) or 1
            if self.keep < top_k:
                raise UserError(
                    f"`keep={self.keep}` is below top-k: every token uses {top_k} experts",
                    hint=f"keep at least {top_k} experts",
                )
            arch.check_expert_count(config, self.keep)
        if self.refit not in (None, *REFITS):
            raise unknown_name("refit", str(self.refit), list(REFITS))
        if self.tune_router < 0:
            raise UserError(f"`tune_router={self.tune_router}` is below 0")
        for level in self.level:
            if level not in LEVELS:
                raise unknown_name("level", level, list(LEVELS))
        for pool in self.pool:
            if pool not in POOLS:
                raise unknown_name("pool", pool, list(POOLS))
        from moetools.routing.classifier import check_classifier

        check_classifier(self.classifier, self.prefix, self.threshold)

    def union_tasks(self, tasks: Sequence[str]) -> list[tuple[str, ...]]:
        """The tasks of each union, in the order of the data.

        Raises:
            UserError: an unknown task, fewer than two, or the same union twice.
        """
        found: list[tuple[str, ...]] = []
        for union in self.union:
            named = list(tasks) if union == "all" else union.split("+")
            for name in named:
                if name not in tasks:
                    raise unknown_name("task", name, list(tasks))
            chosen = tuple(task for task in tasks if task in named)
            if len(chosen) < 2 or len(chosen) != len(named):
                raise UserError(f"`union={union}` does not name two or more different tasks", hint="`union=code+math`")
            fault = folder_fault("+".join(chosen))
            if fault:
                raise UserError(f"`union={union}` cannot be a folder of the output: {fault}", hint="shorter task names")
            if chosen in found:
                raise UserError(f"`union={union}` is given twice")
            found.append(chosen)
        return found

    def level_settings(self) -> list[RoutingLevel]:
        """All ways of routing by sentence or sequence that are to be measured."""
        from moetools.routing.routing_level import Reach, RoutingLevel, Weights

        found = []
        pools = self.pool or POOLS
        for level in dict.fromkeys(self.level):
            if level in ("token", "task"):
                continue
            for pool in pools:
                reaches = [
                    reach
                    for reach in get_args(Reach)
                    if reach != "previous" or (level == "sentence" and pool != "seq-topk")
                ]
                weights = ("token",) if pool == "seq-topk" else get_args(Weights)
                found += [
                    RoutingLevel(level=level, pool=pool, reach=reach, weights=weight)  # type: ignore[arg-type]
                    for reach in reaches
                    for weight in weights
                ]
        return found
