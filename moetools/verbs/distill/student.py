"""Make a dense student from a MoE teacher: fitted layer by layer, written, reloaded and compared; no training yet."""

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moetools.checkpoint.reader import Checkpoint, open_checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.checkpoint.writer import CheckpointWriter, check_output
from moetools.errors import UserError
from moetools.forward.memory import module_bytes
from moetools.forward.progress import Progress
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.methods.distill.base import DenseInit, Scaling
from moetools.passes.student_layers import FitRecipe, LayerFit, StudentFitter, check_width, kept_layers
from moetools.passes.student_streams import StudentLayer, StudentStreams
from moetools.pipeline.estimate import estimate_seconds
from moetools.pipeline.verification import Intended, probe_batch, tensor_digests, verify_checkpoint
from moetools.plugins import load_plugin
from moetools.text.options import DataOptions, load_tokens
from moetools.text.tokens import TokenData
from moetools.verbs.distill.report import StudentReport, student_card
from moetools.verbs.distill.student_checkpoint import (
    StudentPlan,
    StudentTensors,
    active_width,
    check_equivalent,
    plan_student,
    shared_width,
)

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StudentOptions:
    """What kind of student is asked for.

    Attributes:
        init: plug-in name in `moetools.methods.distill`.
        width: neurons of every FFN; None takes what a token uses in the teacher.
        layers: decoder layers; None keeps all.
        scaling: "uniform" or "marginal", how experts' neurons are scaled down.
        warm_start: fit every FFN to what its MoE block did before any training.
        local_steps: gradient steps of the warm start on each FFN alone.
        seed: for what is drawn at random.
    """

    init: str = "neurons"
    width: int | None = None
    layers: int | None = None
    scaling: Scaling = "uniform"
    warm_start: bool = True
    local_steps: int = 0
    seed: int = 0

    def load_init(self) -> DenseInit:
        """The plug-in.

        Raises:
            UserError: unknown, or one that cannot do without the warm start; a value out of range.
        """
        init: DenseInit = load_plugin("moetools.methods.distill", self.init, kind="initialisation").METHOD
        if init.wide and not self.warm_start:
            raise UserError(f"--init {self.init} chooses neurons in the warm start", hint="leave out --no-warm-start")
        if self.scaling not in ("uniform", "marginal"):
            raise UserError(f"--scaling '{self.scaling}' is unknown; legal: uniform, marginal")
        for option, value, least in (("--width", self.width, 1), ("--local-steps", self.local_steps, 0)):
            if value is not None and value < least:
                raise UserError(f"{option} {value} is below {least}")
        if self.local_steps and not self.warm_start:
            raise UserError("--local-steps belong to the warm start", hint="leave out --no-warm-start")
        return init


class StudentRun:
    """One run that makes a student; every check that needs no weights is made in `__init__`.

    Raises:
        UserError: unknown initialisation, illegal width or number of layers, unusable output, no text.
        CheckpointError, UnsupportedModelError: the teacher cannot be handled, or is dense already.
    """

    def __init__(
        self,
        teacher: Path,
        out: Path,
        data: DataOptions | None,
        forward: ForwardOptions,
        options: StudentOptions,
        *,
        command: str,
        overwrite: bool = False,
        resume: bool = False,
        verify: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self.started = time.monotonic()
        self.out, self.forward, self.options, self.command = Path(out), forward, options, command
        self.overwrite, self.resume, self.verify = overwrite, resume, verify
        self.init = options.load_init()
        if data is None or not data.data:
            raise UserError("distillation fits the student to the teacher on text", hint="--data FILE, or NAME=FILE")
        self.source: Checkpoint = open_checkpoint(teacher)
        self.teacher = StreamedModel(self.source, forward, progress=progress)
        refuse_dense(self.teacher)
        self.teacher.stock.check_names()
        self.plan: StudentPlan = plan_student(
            self.teacher, kept_layers(self.teacher.num_layers, options.layers), options.width
        )
        shape = self.teacher.layer_shape(1)
        check_width(self.plan.width, shared_width(self.teacher), shape.num_experts * shape.expert_size, options.init)
        self.student = StreamedModel(self.source, forward, config=dict(self.plan.config))
        self.new_bytes = module_bytes(self.student.stock.model, self._disk_dtype())
        check_output(self.out, self.source, overwrite, resume, self.new_bytes)
        self.data: TokenData = load_tokens(data, self.source, self.teacher.vocab_size)
        if self.plan.warning:
            _LOG.warning(self.plan.warning)

    def _disk_dtype(self) -> torch.dtype:
        """The widest of the teacher's."""
        dtypes = [TORCH_DTYPES[info.dtype] for info in self.source.tensors.values()]
        return max((one for one in dtypes if one.is_floating_point), key=lambda one: one.itemsize)

    def settings(self) -> dict[str, Any]:
        """What determines every byte of the student."""
        return {
            "verb": "distill",
            "student": asdict(self.options),
            "width": self.plan.width,
            "layers": list(self.plan.layers),
            "model": self.source.fingerprint(),
            "data": self.data.fingerprint,
            "dtype": str(self.teacher.dtype),
        }

    def dry_report(self) -> StudentReport:
        """Sizes, memory and time; nothing is computed or written."""
        memory = self.teacher.memory_plan(self.data.batches, keep_native=True)
        memory.check()
        estimate = estimate_seconds(
            self.teacher, 3 * self.data.num_tokens, read_bytes=2 * self.source.total_bytes, written_bytes=self.new_bytes
        )
        return self._report([], self.new_bytes, {"expected": round(estimate, 1)}, verified=False, dry_run=True)

    def run(self) -> StudentReport:
        with CheckpointWriter(
            self.out,
            source=self.source,
            plan=self.settings(),
            expected_bytes=self.new_bytes,
            overwrite=self.overwrite,
            resume=self.resume,
        ) as writer:
            fits, intended = self._write(writer)
            contents = writer.assemble()
            written = time.monotonic()
            if self.verify:
                verify_checkpoint(contents, self.forward, intended, source=self.source, progress=self.teacher.progress)
            seconds = {
                "fit": round(written - self.started, 3),
                "verify": round(time.monotonic() - written, 3),
            }
            size = open_checkpoint(contents).total_bytes
            report = self._report(fits, size, seconds, verified=self.verify)
            writer.write_json("moetools.json", report.to_json())
            writer.write_text("README.md", student_card(report))
            writer.commit()
        return report

    def _write(self, writer: CheckpointWriter) -> tuple[list[LayerFit], Intended]:
        teacher, student = self.teacher, self.student
        shape = teacher.layer_shape(1)
        recipe = FitRecipe(
            init=self.init,
            scaling=self.options.scaling,
            warm_start=self.options.warm_start,
            local_steps=self.options.local_steps,
            seed=self.options.seed,
        )
        fitter = StudentFitter(recipe, width=self.plan.width, top_k=shape.top_k)
        if "rest" not in writer.finished:
            writer.write_unit("rest", self.source.read(student.stock.names[None]))
        writer.carry_sidecars()
        writer.write_json("config.json", dict(self.plan.config))
        fits: list[LayerFit] = []
        digests: dict[int, dict[str, str]] = {}
        # Not inference mode: the local steps of the warm start need gradients.
        with torch.no_grad():
            streams = StudentStreams(teacher, self.data, self.plan.layers, self.init.needs)
            tensors = StudentTensors(teacher, student, self.plan, streams.block)
            batch = student.on_device(probe_batch(self.data, student.vocab_size))
            hidden = student.skeleton.enter(batch)[0]
            for layer in streams.layers():
                assert isinstance(layer, StudentLayer)
                ffn, fit = fitter.fit(layer, tensors.dtype(layer))
                layer.finish(ffn)
                fits.append(fit)
                place, inside = tensors.place(layer), tensors.in_module(layer, ffn)
                digests[place] = tensor_digests(inside)
                unit = f"layer-{place:05d}"
                if unit not in writer.finished:
                    writer.write_unit(unit, tensors.on_disk(layer, ffn))
                hidden = student.run_tensors(place, inside, batch, hidden)
            logits = student.skeleton.logits(batch, hidden)
            rows, length = batch.input_ids.shape
            streamed = teacher.skeleton.logits(batch, streams.last_hidden(0)[:rows, :length].to(teacher.device))
        model_type = self.plan.config["model_type"]
        check_equivalent(logits, streamed, batch, teacher.dtype, model_type)
        return fits, Intended(digests=digests, batch=batch, logits=logits)

    def _report(
        self, fits: list[LayerFit], nbytes: int, seconds: dict[str, float], *, verified: bool, dry_run: bool = False
    ) -> StudentReport:
        teacher_type = self.source.config["model_type"]
        return StudentReport(
            command=self.command,
            out=str(self.out),
            teacher=str(self.source.path),
            teacher_fingerprint=self.source.fingerprint(),
            data=self.data.fingerprint,
            families=(teacher_type, self.plan.config["model_type"]),
            width=self.plan.width,
            active_width=active_width(self.teacher),
            layers=(self.teacher.num_layers, len(self.plan.layers)),
            parameters=(_parameters(self.teacher), _parameters(self.student)),
            nbytes=(self.source.total_bytes, nbytes),
            options=asdict(self.options),
            settings=self.settings(),
            fits=fits,
            warning=self.plan.warning,
            seconds=seconds,
            memory=self.teacher.memory_plan(self.data.batches, keep_native=True),
            verified=verified,
            dry_run=dry_run,
        )


def refuse_dense(teacher: StreamedModel) -> None:
    """A teacher without experts has nothing to distill.

    Raises:
        UserError: it is dense.
    """
    if not teacher.stock.moe_layers:
        raise UserError(
            f"the teacher {teacher.checkpoint.path} is dense already (model_type '{teacher.arch.model_type}')",
            hint="name a Mixture-of-Experts checkpoint; --student PATH trains a student that exists",
        )


def _parameters(model: StreamedModel) -> int:
    return sum(parameter.numel() for parameter in model.stock.model.parameters())
