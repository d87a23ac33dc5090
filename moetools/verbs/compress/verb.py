"""The best mix of fewer experts and fewer bits for a byte budget: predicted, checked by building, and built."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moetools import __version__
from moetools.architectures.kv_cache import kv_cache_bytes
from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.output import check_apart, check_output
from moetools.errors import UserError
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.options import Writing
from moetools.pipeline.plots import check_shown, write_shown
from moetools.pipeline.unchanged import Unchanged
from moetools.text.options import DataOptions, load_tokens
from moetools.text.tokens import TokenData
from moetools.verbs.compress.building import Builder, Judge, Measurements, as_options, commands, inputs_of, some_of
from moetools.verbs.compress.candidates import Candidate, Sizes
from moetools.verbs.compress.finals import Finals
from moetools.verbs.compress.options import CompressOptions
from moetools.verbs.compress.page import frontier_page
from moetools.verbs.compress.prediction import Prediction, Probe, probe_of
from moetools.verbs.compress.report import CompressReport, RatedPlan
from moetools.verbs.compress.schedule import JOINT, MORE, REFIT_SEQUENCES, passes_taken, probe_tokens
from moetools.verbs.compress.workspace import Workspace
from moetools.verbs.route.data import part_of_text
from moetools.verbs.run.recipe import COMPARE, REPORT, Recipe, Step, recipe_text

_STEP_NAMES = {"quantize": "quantized", "distill": "healed"}


def compress(
    model: Path,
    out: Path,
    options: CompressOptions,
    text: DataOptions,
    forward: ForwardOptions,
    writing: Writing,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> CompressReport:
    """Write the checkpoint with the least predicted, then measured, loss whose weight files fit into the budget.

    Raises:
        UserError: no budget, one that nothing fits into or everything does, no text, an output that cannot be used.
        MoetoolsError: what the commands refuse that build plans; nothing is left in place of `out`.
    """
    options.check()
    planner = _Planner(Path(model), Path(out), options, text, forward, writing, command, progress)
    if writing.dry_run:
        return planner.report([RatedPlan(plan=one) for one in planner.candidates])
    with planner:
        rated = planner.predicted()
        if options.plan_only:
            rated[0] = replace(rated[0], chosen=True)
            report = planner.report(rated, plan_file=planner.write_plan(rated[0].plan))
        else:
            report = planner.report(planner.built(rated))
    write_shown(options.html, options.plots, lambda: frontier_page(report))
    return report


class _Planner:
    """One run."""

    def __init__(
        self,
        model: Path,
        out: Path,
        options: CompressOptions,
        text: DataOptions,
        forward: ForwardOptions,
        writing: Writing,
        command: str,
        progress: Progress | None,
    ) -> None:
        self.model, self.out, self.options, self.text = model, out, options, text
        self.forward, self.writing, self.command, self._progress = forward, writing, command, progress
        if not text.data:
            raise UserError("plans are measured on text", hint="`data`")
        text.check()
        self.text = text = replace(text, data=options.kept(text.data, "data"))
        self._tests = options.kept(options.test, "test") if options.test else []
        self.sizes = Sizes(model, forward, options.target, options.min_experts)
        self._same_inputs = Unchanged([self.sizes.source], writes=True)
        self.cache = self._cache_bytes()
        self.budget = options.size(self.sizes.file_bytes) - self.cache
        if self.budget <= 0:
            raise UserError(
                f"keys and values of {options.batch} x {options.context} tokens take {self.cache:,} bytes, and "
                f"`target_size={options.target_size}` is no more",
                hint="a smaller `context`, or a larger `target_size`",
            )
        if self.budget >= self.sizes.file_bytes:
            has = f"{self.sizes.file_bytes:,} bytes"
            raise UserError(f"`target_size={options.target_size}`: the original has {has} and fits already")
        self.candidates = self.sizes.fitting(self.budget)
        self._work = Workspace(out)
        self.plan_file = out.with_name(f"{out.name}-plan.yaml")
        self._check_places()
        self.seconds: dict[str, float] = {}
        self._taken: list[tuple[Probe, int]] = []
        self.prediction = Prediction(num_experts=self.sizes.num_experts)

    def _cache_bytes(self) -> int:
        """Of the keys and values that must fit beside the weights."""
        if self.options.context is None:
            return 0
        config = self.sizes.arch.text(self.sizes.source.config)
        one = kv_cache_bytes(config, config["num_hidden_layers"], self.options.context)
        if one is None:
            raise UserError("`context`: config.json does not say how large keys and values are")
        return one * self.options.batch

    def _check_places(self) -> None:
        held_out = {f"held-out {what}": path for what, path in replace(self.text, data=self.options.test).paths()}
        writes = {"output": self.out} | ({"the plan": self.plan_file} if self.options.plan_only else {})
        reads = {"model": self.model, **dict(self.text.paths()), **held_out}
        check_shown(self.options.html, self.options.plots, {**reads, **writes})
        check_apart(writes, reads)
        self._work.check(resume=self.writing.resume, overwrite=self.writing.overwrite)
        check_output(self.out, self.writing.overwrite, self.writing.resume, self.budget * (1 + self.options.checks))
        if self.options.plan_only and self.plan_file.exists() and not self.writing.overwrite:
            raise UserError(f"the plan '{self.plan_file}' exists", hint="move it away, or replace it with `overwrite`")

    def __enter__(self) -> None:
        self._work.open(resume=self.writing.resume)
        try:
            self._begin()
        except BaseException:
            self._work.close(keep=True)
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._work.close(keep=kind is not None)

    def _begin(self) -> None:
        calibration, self.held_out = self._load()
        self._singles = self.prediction.single_probes(self.candidates)
        joint = any(one.method != "none" and one.bits.experts is not None for one in self.candidates)
        asked = self.options.probe_tokens
        tokens = probe_tokens(self._singles, calibration.num_tokens, joint=joint) if asked is None else asked
        judged = some_of(self.held_out, tokens)
        self._judged = judged.num_tokens
        self._judge = Judge(self.model, judged, self.forward, self._progress)
        texts = [some_of(calibration, times * tokens, least=REFIT_SEQUENCES) for times in (1, MORE)]
        little, more, everything = (text.num_tokens for text in (*texts, calibration))
        self._tokens = (little, min(more, everything), everything)
        # Probes are run in these and nowhere else, in any mix.
        self._little = self._builder(texts[0], self._work.little, self._work.probes, "packed", alone=False)
        self._more = self._builder(texts[1], self._work.more, self._work.probes, "packed", alone=False)
        enough = sum(len(batch.input_ids) for batch in calibration.batches) >= REFIT_SEQUENCES
        self._full = self._builder(calibration, self._work.text, self._work.plans, self.options.target, alone=enough)
        same = json.dumps([self.sizes.source.fingerprint(), judged.fingerprint, str(self.forward)])
        self._known = Measurements(self._work.measured, same, self._judge, self._same_inputs)

    def _builder(self, text: TokenData, stored: Path, folder: Path, target: str, *, alone: bool) -> Builder:
        settings = json.dumps([self.sizes.source.fingerprint(), text.fingerprint, str(self.forward), __version__])
        options = as_options(text, stored)
        return Builder(
            self.model,
            folder,
            target,
            options,
            self._beside,
            self._progress,
            settings=settings,
            tokens=text.num_tokens,
            alone=alone,
        )

    def _load(self) -> tuple[TokenData, TokenData]:
        """Calibration and held-out text."""
        source = self.sizes.source
        model = StreamedModel(source, self.forward)
        vocab_size, budget = model.vocab_size, self.forward.budget_bytes
        # The judge keeps the original's embeddings and head while commands run.
        left = None if budget is None else max(1, budget - model.rest_bytes())
        self._beside = replace(self.forward, memory_budget=left)
        tokens = load_tokens(self.text, source, vocab_size)
        if self._tests:
            judged = replace(self.text, data=self._tests, samples="all", shuffle=False)
            return tokens, load_tokens(judged, source, vocab_size)
        return part_of_text(tokens, held_out=False), part_of_text(tokens, held_out=True)

    def predicted(self) -> list[RatedPlan]:
        """Every plan with its predicted loss, the most promising first."""
        began, candidates = time.monotonic(), self.candidates
        if len(candidates) > 1:
            self.prediction = replace(self.prediction, measured=self._tried(self._singles, self._little))
            if self._tokens[0] < self._tokens[1]:
                again = self._tried(self.prediction.learning_probes(), self._more)
                self.prediction = self.prediction.learned(again, self._tokens)
            joint = self._tried(self.prediction.joint_probes(candidates, JOINT), self._little)
            self.prediction = self.prediction.fitted(joint)
        self.seconds["predict"] = time.monotonic() - began
        if len(candidates) == 1:
            return [RatedPlan(plan=candidates[0])]
        rated = [RatedPlan(plan=one, predicted=self.prediction.kl(one)) for one in candidates]
        return sorted(rated, key=lambda one: one.predicted or 0.0)

    def _tried(self, probes: Sequence[Probe], builder: Builder) -> dict[Probe, float]:
        self._taken += [(probe, builder.tokens) for probe in probes]
        return {probe: self._known.kl(probe, builder) for probe in probes}

    def built(self, rated: Sequence[RatedPlan]) -> list[RatedPlan]:
        """The most promising plans built and measured, the best of them put in the place of the output."""
        began = time.monotonic()
        finals = Finals(
            name=self.out.name,
            budget=self.budget,
            checks=self.options.checks,
            heal_minutes=self.options.heal_minutes,
            verify=self.writing.verify,
            builder=self._full,
            kl=self._known.of_built,
            same_inputs=self._same_inputs,
            work=self._work,
        )
        found, taken = finals.best(rated)
        self.seconds["build"] = time.monotonic() - began
        finals.publish(taken, self.out, self.command, self.report(found).to_json(), overwrite=self.writing.overwrite)
        return found

    def write_plan(self, plan: Candidate) -> Path:
        """The recipe that builds a plan."""
        steps: list[Step] = []
        for verb, options in commands(probe_of(plan), self.options.target, self.options.heal_minutes):
            model, named = inputs_of(verb, self.model, steps[-1].out or self.model if steps else self.model)
            read = {name: getattr(self.text, name) for name in ("data", "seq_len", "samples")}
            given = {name: value for name, value in {**options, **named, **read}.items() if value is not None}
            name = _STEP_NAMES.get(verb.name, "reduced")
            places = {verb.places[0].name: model}
            steps.append(Step(name=name, verb=verb, places=places, options=given, out=self.out / name))
        judged = {"reference": self.model, "data": self._tests, "seq_len": self.text.seq_len}
        report = Step(name=REPORT, verb=COMPARE, places={}, options=judged) if self._tests else None
        recipe = Recipe(about=plan.words(), out=self.out, steps=tuple(steps), report=report)
        text = recipe_text(recipe, {"model": str(self.model), "out": str(self.out)})
        write_durably(self.plan_file, text.encode())
        return self.plan_file

    def report(self, plans: Sequence[RatedPlan], plan_file: Path | None = None) -> CompressReport:
        """What was found so far."""
        return CompressReport(
            command=self.command,
            out=str(self.out),
            original=self.sizes.file_bytes,
            budget=self.budget,
            cache=self.cache,
            target=self.options.target,
            plans=tuple(plans),
            probes=len(self._taken),
            passes=None if self.writing.dry_run else passes_taken(self._taken, self._judged, self._tokens[2]),
            interaction=None if self.writing.dry_run else self.prediction.interaction,
            seconds=self.seconds,
            plan_file=plan_file,
        )
