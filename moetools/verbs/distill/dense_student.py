"""A dense student of a MoE teacher: fitted layer by layer, with no training yet."""

import logging
from collections.abc import Generator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.errors import UserError
from moetools.formats.reader import open_model, precision_note
from moetools.forward.memory import MemoryPlan, module_bytes
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.stock import LAYER_NAME
from moetools.forward.streaming import StreamedModel
from moetools.methods.distill.base import DenseInit
from moetools.passes.recipe_checks import check_held_out
from moetools.passes.stored import ReplayedLayer
from moetools.passes.student_layers import FitRecipe, StudentFitter, check_width, fit_bytes, kept_layers, restore_fit
from moetools.passes.student_streams import LOCAL_TOKENS, SAMPLE_TOKENS, StudentLayer, StudentStreams
from moetools.passes.two_streams import streams_plan
from moetools.pipeline.finished import FinishedUnits
from moetools.pipeline.outline import Outline
from moetools.pipeline.verification import Intended
from moetools.pipeline.work import Outcome, Unit, Work, never
from moetools.plugins import load_plugin
from moetools.text.options import DataOptions, load_tokens
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.distill.report import DistillReport, StudentReport
from moetools.verbs.distill.student_checkpoint import (
    StudentPlan,
    StudentTensors,
    active_width,
    check_equivalent,
    plan_student,
    shared_width,
)

_LOG = logging.getLogger(__name__)


class DenseStudent(Work[DistillReport]):
    """A student with one FFN per layer.

    Args:
        text: what its layers are fitted on.
        seed: for what is drawn at random.

    Raises:
        UserError: unknown initialisation, illegal width or number of layers, no text, a teacher that is dense already.
        CheckpointError, UnsupportedModelError: the teacher cannot be handled.
    """

    def __init__(
        self,
        teacher: Path,
        text: DataOptions,
        forward: ForwardOptions,
        options: StudentOptions,
        *,
        seed: int,
        command: str,
        progress: Progress | None,
    ) -> None:
        self.forward, self.options, self.text, self.seed, self.command = forward, options, text, seed, command
        self.init = load_init(options)
        if not text.data:
            raise UserError("distillation fits the student to the teacher on text", hint="`data`")
        self.source = open_model(teacher)
        self.model = StreamedModel(self.source, forward, progress=progress)
        refuse_dense(self.model)
        self.model.stock.check_names()
        kept = kept_layers(self.model.num_layers, options.layers)
        self.plan: StudentPlan = plan_student(self.model, kept, options.width)
        shape = self.model.layer_shape(1)
        check_width(self.plan.width, shared_width(self.model), shape.num_experts * shape.expert_size, options.init)
        if self.plan.warning:
            _LOG.warning(self.plan.warning)

    @cached_property
    def _student(self) -> StreamedModel:
        return StreamedModel(self.source, self.forward, config=dict(self.plan.config))

    def output(self) -> StreamedModel:
        return self._student

    def config(self) -> dict[str, Any]:
        return dict(self.plan.config)

    def reads(self) -> Mapping[str, Path]:
        return {"teacher": self.source.path, **dict(self.text.paths())}

    def expected_bytes(self) -> int:
        return module_bytes(self._student.stock.model, TORCH_DTYPES[self._widest])

    @property
    def _widest(self) -> str:
        """The widest floating-point dtype of the teacher."""
        dtypes = {info.dtype for info in self.source.tensors.values()}
        floating = [one for one in sorted(dtypes) if TORCH_DTYPES[one].is_floating_point]
        return max(floating, key=lambda one: TORCH_DTYPES[one].itemsize)

    def outline(self) -> Outline | None:
        if not self.plan.dense:
            return None
        stock, known = self._student.stock, self.source.tensors
        layers = {name: one for name, one in stock.model.state_dict().items() if LAYER_NAME.search(name)}
        tensors = {name: (self._widest, tuple(one.shape)) for name, one in layers.items()}
        beside = {name: (known[name].dtype, known[name].shape) for name in stock.names[None]}
        return Outline(config=self.plan.config, tensors=tensors | beside)

    def load(self) -> None:
        self.data = load_tokens(self.text, self.source, self.model.vocab_size)
        check_held_out(self.data, "the student's fit")

    def memory(self) -> MemoryPlan:
        shape = self.model.layer_shape(1)
        neurons = shared_width(self.model) + shape.num_experts * shape.expert_size
        tokens = min(self.data.num_tokens, LOCAL_TOKENS) if self.data else 0
        return streams_plan(
            self.model,
            self._student,
            self.data,
            self.init.needs,
            sample_tokens=SAMPLE_TOKENS,
            solver=fit_bytes(self.plan.width, neurons, shape.hidden_size, tokens if self.options.steps_alone else 0),
        )

    def settings(self) -> Mapping[str, Any]:
        given = asdict(self.options) | {"local_steps": self.options.steps_alone}
        options = {key: value for key, value in given.items() if key not in ("calibration", "student")}
        return {
            "verb": "distill",
            "student": {**options, "seed": self.seed},
            "width": self.plan.width,
            "layers": list(self.plan.layers),
            "model": self.source.fingerprint(),
            "data": self.data.fingerprint if self.data else None,
            "dtype": str(self.model.dtype),
        }

    def units(self, finished: FinishedUnits) -> Generator[Unit]:
        assert self.data is not None
        teacher = self.model
        rest = self.source.read(self._student.stock.names[None])
        yield Unit(index=None, tensors=rest, on_disk=lambda: rest)
        streams = StudentStreams(teacher, self.data, self.plan.layers, self.init.needs, self.memory_plan, finished)
        tensors = StudentTensors(teacher, self._student, self.plan, streams.block)
        fitter = self._fitter()
        for layer in streams.layers():
            if isinstance(layer, ReplayedLayer):
                facts = finished.facts(layer.index)
                yield Unit(index=layer.index, tensors=layer.tensors, on_disk=never, facts=facts)
            else:
                yield self._unit(layer, fitter, tensors)
        self._streams = streams

    def _fitter(self) -> StudentFitter:
        recipe = FitRecipe(
            init=self.init,
            scaling=self.options.scaling,  # type: ignore[arg-type] # checked by the options
            warm_start=self.options.warm_start,
            local_steps=self.options.steps_alone,
            seed=self.seed,
        )
        return StudentFitter(recipe, width=self.plan.width, top_k=self.model.layer_shape(1).top_k)

    def _unit(self, layer: StudentLayer, fitter: StudentFitter, tensors: StudentTensors) -> Unit:
        self.model.progress.phase("solving")
        ffn, fit = fitter.fit(layer, tensors.dtype(layer))
        self.model.progress.phase("calibrating")
        layer.finish(ffn)
        return Unit(
            index=tensors.place(layer),
            tensors=tensors.in_module(layer, ffn),
            on_disk=lambda: tensors.on_disk(layer, ffn),
            facts=asdict(fit),
        )

    def check(self, intended: Intended) -> None:
        """The student's own code computes what the teacher's layers with the new FFNs compute."""
        batch, teacher = intended.batch, self.model
        rows, length = batch.input_ids.shape
        with torch.no_grad():
            hidden = self._streams.last_hidden(0)[:rows, :length].to(teacher.device)
            streamed = teacher.skeleton.logits(batch, hidden)
        check_equivalent(intended.logits, streamed, batch, teacher.dtype, self.plan.config["model_type"])

    def report(self, outcome: Outcome) -> DistillReport:
        return DistillReport(
            command=self.command,
            out=str(outcome.out),
            made=self.made_report(outcome),
            training=None,
            seconds=outcome.seconds,
            peak_memory=outcome.peak_memory,
            verified=outcome.verified,
        )

    def made_report(self, outcome: Outcome) -> StudentReport:
        """How the student was made."""
        written = outcome.checkpoint
        return StudentReport(
            command=self.command,
            out=str(outcome.out),
            teacher=str(self.source.path),
            teacher_fingerprint=self.source.fingerprint(),
            data=self.data.fingerprint if self.data else "",
            families=(self.source.config["model_type"], self.plan.config["model_type"]),
            width=self.plan.width,
            active_width=active_width(self.model),
            layers=(self.model.num_layers, len(self.plan.layers)),
            parameters=(_parameters(self.model), _parameters(self._student)),
            nbytes=(self.source.total_bytes, self.expected_bytes() if written is None else written.total_bytes),
            options=self.settings()["student"],
            settings=self.settings(),
            fits=[restore_fit(facts) for facts in outcome.layers.values()],
            warning=self.plan.warning,
            precision=precision_note(self.source),
            seconds=outcome.seconds,
            peak_memory=outcome.peak_memory,
            memory=outcome.memory,
            verified=outcome.verified,
            dry_run=outcome.dry_run,
        )


def load_init(options: StudentOptions) -> DenseInit:
    """The initialisation.

    Raises:
        UserError: unknown, or one that cannot do without the warm start; a value out of range.
    """
    init: DenseInit = load_plugin("moetools.methods.distill", options.init, kind="initialisation").METHOD
    if init.wide and not options.warm_start:
        raise UserError(f"`init={options.init}` chooses neurons in the warm start", hint="leave out `warm_start=False`")
    options.check()
    if options.local_steps and not options.warm_start:
        raise UserError("`local_steps` belong to the warm start", hint="leave out `warm_start=False`")
    return init


def refuse_dense(teacher: StreamedModel) -> None:
    """A teacher without experts has nothing to distill.

    Raises:
        UserError: it is dense.
    """
    if not teacher.stock.moe_layers:
        raise UserError(
            f"the teacher {teacher.checkpoint.path} is dense already (model_type '{teacher.arch.model_type}')",
            hint="name a Mixture-of-Experts checkpoint; `student` trains one that exists",
        )


def _parameters(model: StreamedModel) -> int:
    return sum(parameter.numel() for parameter in model.stock.model.parameters())
