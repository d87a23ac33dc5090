"""Choose each task's experts, write a small checkpoint per task, and measure what that is worth."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moetools.architectures.base import find_architecture
from moetools.checkpoint.output import check_output
from moetools.checkpoint.reader import Checkpoint, open_checkpoint
from moetools.forward.calibrate import ModelStatistics, check_statistics, collect_statistics, load_statistics
from moetools.forward.evaluate import Evaluator
from moetools.forward.progress import Progress
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.methods.route.base import RouteScore, TaskLabels
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
from moetools.verbs.reduce.report import describe_output, versions
from moetools.verbs.route.data import (
    TaskData,
    by_sequence,
    check_task_names,
    load_task_data,
    prefixes,
    prompts,
    task_tokens,
)
from moetools.verbs.route.extraction import Extraction, expected_bytes, expected_parameters
from moetools.verbs.route.html import html_page
from moetools.verbs.route.levels import find_sentence_ends, ids_of, measure_levels
from moetools.verbs.route.options import RouteOptions
from moetools.verbs.route.output import FolderWriter
from moetools.verbs.route.report import (
    CurvePoint,
    MeasuredOutput,
    RouteReport,
    routing_card,
    text_of_json,
)
from moetools.verbs.route.selection import Selector, TaskSets
from moetools.verbs.route.tuning import tune_routers, with_routers

__all__ = ["RouteOptions", "RouteReport", "route_tasks"]


def route_tasks(
    model: Path,
    out: Path,
    data: DataOptions,
    forward: ForwardOptions,
    options: RouteOptions,
    *,
    command: str,
    progress: Progress | None = None,
) -> RouteReport:
    """Write a checkpoint per task (`out/TASK`), the routing for use at run time, and a report.

    One pass over the text of all tasks measures every expert's worth to every task; held-out text judges the result.

    Args:
        command: the command line, for the report.

    Raises:
        UserError, DataError: options or text that cannot be used, before any weight is read.
        CheckpointError, UnsupportedModelError: the input cannot be handled.
        VerificationError: a written checkpoint differs from what was meant; nothing is left in place of `out`.
    """
    return _Run(model, Path(out), data, forward, options, command, progress).run()


@dataclass(frozen=True, kw_only=True)
class _Written:
    """The checkpoints of a run, still in the staging folder."""

    sets: TaskSets
    folder: Path
    tuned: list[tuple[int, float]] | None


class _Run:
    """One run; every check that needs no weights is made in `__init__`."""

    def __init__(
        self,
        model: Path,
        out: Path,
        data: DataOptions,
        forward: ForwardOptions,
        options: RouteOptions,
        command: str,
        progress: Progress | None,
    ) -> None:
        self.started = time.monotonic()
        self.out, self.options, self.forward = out, options, forward
        self.command, self.progress, self.data_options = command, progress, data
        self.score: RouteScore = load_plugin("moetools.methods.route", options.score, kind="score").SCORE
        self.source: Checkpoint = open_checkpoint(model)
        self.config = self.source.config
        self.arch = find_architecture(self.config)
        options.check(self.arch, self.config)
        count = self.arch.num_experts(self.config)
        assert count is not None
        self.num_experts, self.top_k = count, self.arch.top_k(self.config) or 1
        self.largest = options.keep or self.num_experts
        outputs = len(data.data) + len(options.unions)
        self.expected = outputs * expected_bytes(self.source, self.arch, self.largest)
        check_output(out, self.source, options.overwrite, options.resume, self.expected)
        self.model = StreamedModel(self.source, forward, progress=progress)
        self.model.stock.check_names()
        self.extraction = Extraction(
            self.source,
            self.arch,
            forward,
            refit=options.refit,
            seed=options.seed,
            verify=options.verify,
            score=self.score.name,
            command=command,
            progress=progress,
        )
        self.data: TaskData = load_task_data(
            data, options.test, self.source, self.model.vocab_size, top_k=self.top_k, num_experts=self.num_experts
        )
        check_task_names(self.data.tasks)
        self.unions = options.union_tasks(self.data.tasks)
        self.levels = options.level_settings()
        self.ends_V = find_sentence_ends(self.source, self.model.vocab_size, data.tokenizer)

    def run(self) -> RouteReport:
        plan = self.model.memory_plan(self.data.calibration.batches, keep_native=True)
        plan.check()
        if self.options.dry_run:
            return self._report(dry=True)
        with FolderWriter(
            self.out,
            source=self.source,
            plan=self._plan(),
            expected_bytes=self.expected,
            overwrite=self.options.overwrite,
            resume=self.options.resume,
        ) as writer:
            statistics, labels = self._measure(writer.parts)
            selector = Selector(statistics, labels, self.score, self.arch, self.config)
            tasks = [
                selector.task_sets(number, task, self.options.keep, self.options.top_p)
                for number, task in enumerate(self.data.tasks)
            ]
            measured = time.monotonic()
            routing = self._routing(tasks)
            unions = [self._union(selector, tasks, names) for names in self.unions]
            written, routing = self._write(writer.parts, tasks, unions, routing)
            finished = time.monotonic()
            classifier, judged = self._classifier()
            report = self._judge(written, selector, tasks, judged)
            report = replace(
                report,
                seconds={
                    "choose": round(measured - self.started, 3),
                    "write": round(finished - measured, 3),
                    "judge": round(time.monotonic() - finished, 3),
                },
            )
            self._write_files(writer, report, routing, classifier)
            writer.commit([one.sets.name for one in written])
        return report

    def _plan(self) -> dict[str, Any]:
        """Settings that determine every byte of the output, so that only the same run is ever resumed."""
        return {
            "verb": "route-tasks",
            "model": self.source.fingerprint(),
            "data": self.data.calibration.fingerprint,
            "test": self.data.test.fingerprint,
            "dtype": str(self.model.dtype),
            **self.options.plan(),
        }

    def _measure(self, parts: Path) -> tuple[ModelStatistics, TaskLabels]:
        """One pass over all tasks' text, every sequence counted apart; kept for a resume."""
        tokens, task_S = by_sequence(self.data.calibration)
        labels = TaskLabels(task_S=task_S, num_tasks=len(self.data.tasks))
        kept = parts / "statistics.safetensors"
        if kept.exists():
            statistics = load_statistics(kept)
            check_statistics(statistics, model=self.source.fingerprint(), needs=self.score.needs)
            return statistics, labels
        guard = ("max_activation",) if self.score.guarded else ()
        statistics = collect_statistics(self.model, tokens, sorted({"load", *self.score.needs, *guard}))
        statistics.save(kept)
        return statistics, labels

    def _routing(self, tasks: Sequence[TaskSets]) -> TaskRouting:
        return TaskRouting(
            model_type=self.arch.model_type,
            num_experts=self.num_experts,
            top_k=self.top_k,
            model=self.source.fingerprint(),
            tasks={one.name: one.experts for one in tasks},
            sentence_end_ids=ids_of(self.ends_V),
            refitted=[one.name for one in tasks] if self.options.refit != "none" else [],
        )

    def _union(self, selector: Selector, tasks: Sequence[TaskSets], names: tuple[str, ...]) -> TaskSets:
        numbers = [self.data.tasks.index(name) for name in names]
        return selector.union([tasks[number] for number in numbers], numbers)

    def _write(
        self, parts: Path, tasks: Sequence[TaskSets], unions: Sequence[TaskSets], routing: TaskRouting
    ) -> tuple[list[_Written], TaskRouting]:
        """All checkpoints; those an interrupted run had finished are taken as they are."""
        written = []
        for sets in (*tasks, *unions):
            is_union = len(sets.tasks) > 1
            tokens = self._tokens_of(sets)
            own = routing.restricted(sets.tasks, sets.experts) if is_union and self.options.refit == "none" else None
            folder = parts / sets.name
            tuned = None
            if not self.options.tune_router or is_union:
                if not (folder / "config.json").is_file():
                    self.extraction.write(
                        sets, folder, tokens, routing=own, name=self.out / sets.name, resume=self.options.resume
                    )
            else:
                tuned, routing = self._write_tuned(sets, folder, tokens, routing)
            written.append(_Written(sets=sets, folder=folder, tuned=tuned))
        return written, routing

    def _write_tuned(
        self, sets: TaskSets, folder: Path, tokens: TokenData, routing: TaskRouting
    ) -> tuple[list[tuple[int, float]], TaskRouting]:
        """Extract aside, tune, write; always from the start, because training cannot be taken up again."""
        aside = folder.with_name(f".{folder.name}.untuned")
        for stale in (aside, folder):
            shutil.rmtree(stale, ignore_errors=True)
        name = self.out / sets.name
        report = self.extraction.write(sets, aside, tokens, routing=None, name=name, resume=False)
        result = tune_routers(
            self.source,
            report,
            aside,
            folder,
            tokens,
            self.forward,
            steps=self.options.tune_router,
            seed=self.options.seed,
            verify=self.options.verify,
            progress=self.progress,
        )
        shutil.rmtree(aside)
        return result.curve, with_routers(routing, sets.name, result)

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
        statistics = collect_statistics(self.model, tokens, ["router"])
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
        evaluator = Evaluator(self.data.test, reference=reference)
        outputs = []
        for one in written:
            checkpoint = open_checkpoint(one.folder)
            metrics = evaluator.measure(StreamedModel(checkpoint, self.forward, progress=self.progress))
            outputs.append(
                MeasuredOutput(sets=one.sets, size=describe_output(checkpoint), metrics=metrics, tuned=one.tuned)
            )
        levels = measure_levels(self.source, self.levels, evaluator, self.forward, self.ends_V, self.progress)
        return replace(
            self._report(dry=False),
            full=evaluator.reference_metrics(),
            outputs=tuple(outputs),
            overlap=selector.overlap(tasks, self.options.seed),
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
                nbytes=expected_bytes(self.source, self.arch, count),
                parameters=expected_parameters(self.source, self.arch, count),
                share={self.data.tasks[task]: share for task, share in selector.share_curve(count).items()},
            )
            for count in selector.legal_counts()
        )

    def _report(self, *, dry: bool) -> RouteReport:
        return RouteReport(
            command=self.command,
            out=str(self.out),
            input_path=str(self.source.path),
            input_fingerprint=self.source.fingerprint(),
            model_type=self.arch.model_type,
            num_experts=self.num_experts,
            top_k=self.top_k,
            versions=versions(),
            options=self.options.plan(),
            tasks=self.data.tasks,
            tokens={
                "calibration": self.data.calibration.tokens_per_task(),
                "test": self.data.test.tokens_per_task(),
            },
            held_out=self.data.held_out,
            before=describe_output(self.source),
            expected_bytes=self.expected,
            verified=self.options.verify and not dry,
            dry_run=dry,
        )

    def _write_files(
        self, writer: FolderWriter, report: RouteReport, routing: TaskRouting, classifier: TaskClassifier | None
    ) -> None:
        writer.write_text(FILE_NAME, text_of_json(routing.to_json()))
        routing.save_routers(writer.contents)
        if classifier is not None:
            classifier.save(writer.contents / CLASSIFIER_NAME)
        writer.write_text("moetools.json", text_of_json(report.to_json()))
        writer.write_text("README.md", routing_card(report))
        if self.options.report:
            writer.write_text("report.html", html_page(report))
