"""What `route-tasks` makes: a small checkpoint per task, the routing for use at run time, and what both are worth."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from moetools.architectures.base import Architecture, find_architecture
from moetools.architectures.mtp import find_mtp
from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.writer import OutputWriter
from moetools.errors import UserError
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.forward.calibrate import (
    ModelStatistics,
    calibration_plan,
    collect_statistics,
)
from moetools.forward.evaluate import Evaluator
from moetools.forward.memory import MemoryPlan
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.methods.route.base import RouteScore, TaskLabels
from moetools.passes.recipe_checks import check_held_out
from moetools.pipeline.carry_out import stage_checkpoint
from moetools.pipeline.estimate import Rehearsal
from moetools.pipeline.kept import measured_once
from moetools.pipeline.records import describe_output, text_of_json, versions
from moetools.pipeline.stages import Stages
from moetools.pipeline.work import Folder, Outcome
from moetools.plugins import load_plugin
from moetools.routing.classifier import (
    ClassifierReport,
    TaskClassifier,
    fit_classifier,
    judge_classifier,
    ngram_features,
    router_features,
)
from moetools.routing.task_routing import CLASSIFIER_NAME, FILE_NAME, TaskRouting
from moetools.text.options import DataOptions
from moetools.text.tokens import TokenData
from moetools.verbs.reduce.mtp_fate import decide_mtp
from moetools.verbs.reduce.packing import keeps_packed, refit_words
from moetools.verbs.route.data import (
    TaskData,
    by_sequence,
    check_task_names,
    load_task_data,
    prefixes,
    prompts,
    task_tokens,
)
from moetools.verbs.route.html import route_page
from moetools.verbs.route.levels import find_sentence_ends, ids_of, measure_levels
from moetools.verbs.route.options import RouteOptions
from moetools.verbs.route.report import CurvePoint, MeasuredOutput, RouteReport
from moetools.verbs.route.selection import Selector, TaskSets
from moetools.verbs.route.sizes import expected_bytes, expected_parameters
from moetools.verbs.route.task_model import TaskModel, TunedTaskModel, routers_of, with_routers

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Written:
    """A finished checkpoint, still in the scratch folder."""

    sets: TaskSets
    folder: Path
    tuned: list[tuple[int, float]] | None


class TaskFolder(Folder[RouteReport]):
    """One run; every check that needs no weights is made before any is read.

    Raises:
        UserError, DataError: options or text that cannot be used.
        CheckpointError, UnsupportedModelError: the input cannot be handled.
    """

    def __init__(
        self,
        model: Path,
        out: Path,
        text: DataOptions,
        forward: ForwardOptions,
        options: RouteOptions,
        *,
        command: str,
        progress: Progress | None,
    ) -> None:
        self.out, self.text, self.forward, self.options = out, text, forward, options
        self.command, self.progress = command, progress
        self.score: RouteScore = load_plugin("moetools.methods.route", options.score, kind="score").SCORE
        self.source: Checkpoint = open_model(model)
        self.arch: Architecture = find_architecture(self.source.config)
        options.check(self.arch, self.source.config)
        count = self.arch.num_experts(self.source.config)
        assert count is not None
        self.num_experts, self.top_k = count, self.arch.top_k(self.source.config) or 1
        self.largest = options.keep or self.num_experts
        self.model = StreamedModel(self.source, forward, progress=progress)
        self.model.stock.check_names()
        mtp = find_mtp(self.model.stock.extra_names, self.source.tensors, self.arch, self.source.config)
        fewer = options.keep or self.num_experts - 1
        decide_mtp(options.mtp, mtp, before=count, experts=fewer, obstacle=lambda _: "")
        self._judged: RouteReport | None = None
        # Known when the text is read, which decides on the refit.
        self.packed: PackedCheckpoint | None = None
        if options.refit == "joint":
            self._keep_packed("joint")

    def reads(self) -> Mapping[str, Path]:
        held_out = {f"held-out {what}": path for what, path in replace(self.text, data=self.options.test).paths()}
        return {**super().reads(), **dict(self.text.paths()), **held_out}

    def expected_bytes(self) -> int:
        outputs = len(self.text.data) + len(self.options.union)
        return outputs * expected_bytes(self.source, self.arch, self.largest, self.packed)

    def load(self) -> None:
        options = self.options
        self.data: TaskData = load_task_data(
            self.text, options.test, self.source, self.model.vocab_size, top_k=self.top_k, num_experts=self.num_experts
        )
        check_task_names(self.data.tasks)
        self.unions = options.union_tasks(self.data.tasks)
        self.levels = options.level_settings()
        self.ends_V = find_sentence_ends(self.text, self.source, self.model.vocab_size)
        self.refit = self._refit()
        self.packed = self._keep_packed(self.refit)

    def _keep_packed(self, refit: str) -> PackedCheckpoint | None:
        changes = "" if refit == "none" else refit_words(refit)
        return keeps_packed(self.source, self.options.output_format, changes=changes, experts=self.num_experts)

    def _refit(self) -> str:
        """What was asked for; else "joint", unless a task has too little text to choose its ridge on."""
        if self.options.refit == "none":
            return "none"
        try:
            for task in self.data.tasks:
                check_held_out(task_tokens(self.data.calibration, task), "`refit=joint`")
        except UserError as error:
            if self.options.refit is not None:
                raise
            _LOG.warning("%s: the tasks' experts are not refitted", error.message)
            return "none"
        return "joint"

    def memory(self) -> MemoryPlan:
        measured = calibration_plan(self.model, by_sequence(self.data.calibration)[0], self._measured_names())
        judged = Evaluator(self.data.test, reference=self.model).plan(self.model)
        # A union has the most experts: at most those of all its tasks.
        largest = min(self.num_experts, self.largest * max(1, *(len(names) for names in self.unions), 0))
        made = self._task_model(self._any_sets(self.data.tasks, largest), self._routing([])).memory()
        return measured.covering(judged).covering(made)

    def _any_sets(self, tasks: Sequence[str], keep: int) -> TaskSets:
        """Some experts for some tasks, before it is known which."""
        experts = dict.fromkeys(self.model.stock.moe_layers, tuple(range(keep)))
        return TaskSets(name="+".join(tasks), tasks=tuple(tasks), keep=keep, experts=experts, share={}, needed=None)

    def _measured_names(self) -> list[str]:
        guard = ("max_activation",) if self.score.guarded else ()
        return sorted({"load", *self.score.needs, *guard})

    def estimate(self, rehearsal: Rehearsal) -> float:
        """Every task's checkpoint like the first one's, with experts of any choice, and all passes that judge them."""
        first = self._any_sets(self.data.tasks[:1], self.largest)
        made = self._work(first, self._routing([])).estimate(rehearsal)
        outputs = len(self.data.tasks) + len(self.unions)
        judged = rehearsal.a_pass(self.model, self.data.test) * (1 + outputs + len(self.levels))
        return rehearsal.a_pass(self.model, self.data.calibration) + outputs * made + judged

    def settings(self) -> Mapping[str, Any]:
        return {
            "verb": "route-tasks",
            "model": self.source.fingerprint(),
            "data": self.data.calibration.fingerprint,
            "test": self.data.test.fingerprint,
            "dtype": str(self.model.dtype),
            "seed": self.text.seed,
            **asdict(self.options),
            "refit": self.refit,
        }

    def fill(self, writer: OutputWriter, stages: Stages) -> None:
        with stages("choose"):
            statistics, labels = self._measure(writer.scratch)
            selector = Selector(statistics, labels, self.score, self.arch, self.source.config)
            tasks = [
                selector.task_sets(number, task, self.options.keep, self.options.top_p)
                for number, task in enumerate(self.data.tasks)
            ]
            unions = [self._union(selector, tasks, names) for names in self.unions]
        with stages("write"):
            written, routing = self._write(writer.scratch, tasks, unions, self._routing(tasks))
        with stages("judge"):
            classifier, judged = self._classifier()
            self._judged = self._judge(written, selector, tasks, judged)
        self._write_files(writer, routing, classifier)
        for one in written:
            writer.adopt(one.sets.name)

    def _measure(self, scratch: Path) -> tuple[ModelStatistics, TaskLabels]:
        """One pass over all tasks' text, every sequence counted apart; kept for a resume."""
        tokens, task_S = by_sequence(self.data.calibration)
        labels = TaskLabels(task_S=task_S, num_tasks=len(self.data.tasks))
        measured = partial(collect_statistics, self.model, tokens, self._measured_names(), self.memory_plan)
        return measured_once(scratch / "statistics.safetensors", measured), labels

    def _routing(self, tasks: Sequence[TaskSets]) -> TaskRouting:
        return TaskRouting(
            model_type=self.arch.model_type,
            num_experts=self.num_experts,
            top_k=self.top_k,
            model=self.source.fingerprint(),
            tasks={one.name: one.experts for one in tasks},
            sentence_end_ids=ids_of(self.ends_V),
            refitted=[one.name for one in tasks] if self.refit != "none" else [],
        )

    def _union(self, selector: Selector, tasks: Sequence[TaskSets], names: tuple[str, ...]) -> TaskSets:
        numbers = [self.data.tasks.index(name) for name in names]
        return selector.union([tasks[number] for number in numbers], numbers)

    def _write(
        self, scratch: Path, tasks: Sequence[TaskSets], unions: Sequence[TaskSets], routing: TaskRouting
    ) -> tuple[list[_Written], TaskRouting]:
        """All checkpoints; those an interrupted run had finished are taken as they are."""
        written = []
        for sets in (*tasks, *unions):
            work = self._work(sets, routing)
            _, folder = stage_checkpoint(work, scratch, sets.name, self.how, self.memory_plan)
            if not isinstance(work, TunedTaskModel):
                written.append(_Written(sets=sets, folder=folder, tuned=None))
                continue
            routing = with_routers(routing, sets.name, routers_of(folder, self.forward))
            curve = read_json_object(folder / "moetools.json")["healing"]["curve"]
            written.append(_Written(sets=sets, folder=folder, tuned=[(int(step), kl) for step, kl in curve]))
        return written, routing

    def _work(self, sets: TaskSets, routing: TaskRouting) -> TaskModel | TunedTaskModel:
        """What makes the checkpoint of a task or a union."""
        work, steps = self._task_model(sets, routing), self.options.tune_router
        if not steps or len(sets.tasks) > 1:
            return work
        tuned = TunedTaskModel(work, self.forward, steps=steps, seed=self.text.seed, progress=self.progress)
        tuned.load()
        return tuned

    def _task_model(self, sets: TaskSets, routing: TaskRouting) -> TaskModel:
        refit = self.refit
        own = routing.restricted(sets.tasks, sets.experts) if len(sets.tasks) > 1 and refit == "none" else None
        solved = "" if refit == "none" else f", refit {refit}"
        return TaskModel(
            self.source,
            sets,
            self._tokens_of(sets),
            self.forward,
            refit=refit,
            place=self.out / sets.name,
            routing=own,
            method=f"{self.score.name} on {sets.name}{solved}",
            command=self.command,
            seed=self.text.seed,
            progress=self.progress,
            mtp=self.options.mtp,
            output_format=self.options.output_format,
        )

    def _tokens_of(self, sets: TaskSets) -> TokenData:
        """The calibration text of a task, or of a union's tasks."""
        parts = [task_tokens(self.data.calibration, task) for task in sets.tasks]
        if len(parts) == 1:
            return parts[0]
        batches = tuple(batch for part in parts for batch in part.batches)
        return TokenData(
            tasks=(sets.name,),
            batches=batches,
            fingerprint="+".join(part.fingerprint for part in parts),
            seq_len=parts[0].seq_len,
        )

    def _classifier(self) -> tuple[TaskClassifier | None, ClassifierReport | None]:
        """Fitted on the prefixes of the calibration sequences, judged on those held out."""
        kind = self.options.classifier
        if kind == "none":
            return None, None
        features, labels = zip(*(self._features(data) for data in (self.data.calibration, self.data.test)), strict=True)
        classifier = fit_classifier(
            kind,  # type: ignore[arg-type]
            self.data.tasks,
            features[0],
            labels[0],
            prefix=self.options.prefix,
            threshold=self.options.threshold,
        )
        return classifier, judge_classifier(classifier, features[1], labels[1])

    def _features(self, data: TokenData) -> tuple[Tensor, Tensor]:
        tokens, task_S = by_sequence(prefixes(data, self.options.prefix))
        if self.options.classifier == "ngrams":
            return ngram_features(prompts(tokens), self.options.prefix), task_S
        statistics = collect_statistics(self.model, tokens, ["router"], self.memory_plan)
        found = [statistics.finalized(layer)["router"]["mean_probability"] for layer in statistics.layers]
        return router_features(found), task_S

    def _judge(
        self,
        written: Sequence[_Written],
        selector: Selector,
        tasks: Sequence[TaskSets],
        judged: ClassifierReport | None,
    ) -> RouteReport:
        """Every checkpoint on every task's held-out text, beside the full model."""
        reference = StreamedModel(self.source, self.forward, progress=self.progress)
        evaluator = Evaluator(self.data.test, reference=reference, plan=self.memory_plan)
        outputs = []
        for one in written:
            checkpoint = open_model(one.folder)
            metrics = evaluator.measure(StreamedModel(checkpoint, self.forward, progress=self.progress))
            outputs.append(
                MeasuredOutput(sets=one.sets, size=describe_output(checkpoint), metrics=metrics, tuned=one.tuned)
            )
        levels = measure_levels(self.source, self.levels, evaluator, self.forward, self.ends_V, self.progress)
        return replace(
            replace(self._planned(), dry_run=False),
            full=evaluator.reference_metrics(),
            outputs=tuple(outputs),
            overlap=selector.overlap(tasks, self.text.seed),
            scores={layer: score_GE.tolist() for layer, score_GE in selector.scores.items()},
            curve=self._curve(selector),
            levels=tuple(levels),
            classifier=judged,
        )

    def _curve(self, selector: Selector) -> tuple[CurvePoint, ...]:
        """Size and kept score over all numbers of experts the router can serve."""
        return tuple(
            CurvePoint(
                experts=count,
                nbytes=expected_bytes(self.source, self.arch, count, self.packed),
                parameters=expected_parameters(self.source, self.arch, count),
                share={self.data.tasks[task]: share for task, share in selector.share_curve(count).items()},
            )
            for count in selector.legal_counts()
        )

    def _planned(self) -> RouteReport:
        return RouteReport(
            command=self.command,
            out=str(self.out),
            input_path=str(self.source.path),
            input_fingerprint=self.source.fingerprint(),
            model_type=self.arch.model_type,
            num_experts=self.num_experts,
            top_k=self.top_k,
            versions=versions(),
            options={**asdict(self.options), "refit": self.refit},
            tasks=self.data.tasks,
            tokens={
                "calibration": self.data.calibration.tokens_per_task(),
                "test": self.data.test.tokens_per_task(),
            },
            held_out=self.data.held_out,
            before=describe_output(self.source),
            expected_bytes=self.expected_bytes(),
            verified=False,
            dry_run=True,
        )

    def _write_files(self, writer: OutputWriter, routing: TaskRouting, classifier: TaskClassifier | None) -> None:
        writer.write_text(FILE_NAME, text_of_json(routing.to_json()))
        routing.save_routers(writer.contents)
        if classifier is not None:
            classifier.save(writer.contents / CLASSIFIER_NAME)
        if self.options.report:
            assert self._judged is not None
            writer.write_text("report.html", route_page(self._judged))

    def report(self, outcome: Outcome) -> RouteReport:
        if self._judged is None:
            return replace(self._planned(), seconds=outcome.seconds)
        return replace(
            self._judged,
            seconds=outcome.seconds,
            peak_memory=outcome.peak_memory,
            verified=outcome.verified,
            dry_run=False,
        )
