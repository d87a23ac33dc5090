"""What is asked of `route-tasks`, and what can be refused before anything is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from moetools.architectures.base import Architecture
from moetools.errors import UserError
from moetools.plugins import unknown_name
from moetools.routing.classifier import check_classifier
from moetools.routing.routing_level import Level, Pool, Reach, RoutingLevel, Weights

REFITS = ("none", "joint")
LEVELS = (*get_args(Level), "task")


@dataclass(frozen=True, kw_only=True)
class RouteOptions:
    """What is asked of `route-tasks`.

    Attributes:
        score: plug-in name in `moetools.methods.route`.
        keep, top_p: experts per layer, or the part of its score that every layer of a task must keep; exactly one.
        unions: tasks joined by `+`, each one more checkpoint; "all" stands for every task.
        refit: "joint" to solve the down projections anew on each task's text; "none" to leave them.
        tune_router: steps of training each checkpoint's routers towards the full model; 0 for none.
        levels: routing levels to measure on the held-out text beside the tasks; "task" is always measured.
        pools: how a unit's scores are pooled; empty for all ways.
        classifier, prefix, threshold: how prompts are told apart, from how many tokens, and how sure it must be.
        test: held-out text of every task; empty to hold out a fifth of the calibration text.
        report: write report.html.
        overwrite, resume, dry_run, verify, seed: as everywhere.
    """

    score: str
    keep: int | None = None
    top_p: float | None = None
    unions: Sequence[str] = ()
    refit: str = "none"
    tune_router: int = 0
    levels: Sequence[str] = ()
    pools: Sequence[str] = ()
    classifier: str = "ngrams"
    prefix: int = 64
    threshold: float = 0.8
    test: Sequence[str] = ()
    report: bool = True
    overwrite: bool = False
    resume: bool = False
    dry_run: bool = False
    verify: bool = True
    seed: int = 0

    def check(self, arch: Architecture, config: Mapping[str, Any]) -> None:
        """Refuse what cannot work with this model.

        Raises:
            UserError: naming the option, what it got and what is legal.
        """
        if (self.keep is None) == (self.top_p is None):
            raise UserError("give either --keep N or --top-p P", hint="for example --keep 4, or --top-p 0.9")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g} is not above 0 and at most 1", hint="0.9 keeps 90 % of the score")
        if self.keep is not None:
            top_k = arch.top_k(config) or 1
            if self.keep < top_k:
                raise UserError(
                    f"--keep {self.keep} is below top-k: every token uses {top_k} experts",
                    hint=f"keep at least {top_k} experts",
                )
            arch.check_expert_count(config, self.keep)
        if self.refit not in REFITS:
            raise unknown_name("refit", self.refit, list(REFITS))
        if self.tune_router < 0:
            raise UserError(f"--tune-router {self.tune_router} is below 0")
        for level in self.levels:
            if level not in LEVELS:
                raise unknown_name("level", level, list(LEVELS))
        for pool in self.pools:
            if pool not in get_args(Pool):
                raise unknown_name("pool", pool, list(get_args(Pool)))
        check_classifier(self.classifier, self.prefix, self.threshold)

    def union_tasks(self, tasks: Sequence[str]) -> list[tuple[str, ...]]:
        """The tasks of each union, in the order of the data.

        Raises:
            UserError: an unknown task, fewer than two, or the same union twice.
        """
        found: list[tuple[str, ...]] = []
        for union in self.unions:
            named = list(tasks) if union == "all" else union.split("+")
            for name in named:
                if name not in tasks:
                    raise unknown_name("task", name, list(tasks))
            chosen = tuple(task for task in tasks if task in named)
            if len(chosen) < 2 or len(chosen) != len(named):
                raise UserError(f"--union {union} does not name two or more different tasks", hint="--union code+math")
            if chosen in found:
                raise UserError(f"--union {union} is given twice")
            found.append(chosen)
        return found

    def level_settings(self) -> list[RoutingLevel]:
        """All ways of routing by sentence or sequence that are to be measured."""
        found = []
        pools = self.pools or get_args(Pool)
        for level in dict.fromkeys(self.levels):
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

    def plan(self) -> dict[str, Any]:
        """Settings that determine every byte of the output."""
        chosen = {key: value for key, value in self.__dict__.items() if key not in _NO_MATTER}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()}


_NO_MATTER = ("overwrite", "resume", "dry_run", "verify")
