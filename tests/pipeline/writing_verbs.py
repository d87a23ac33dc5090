"""Every way to write a checkpoint, on tiny models: what each reads, and how often it solves what.

`CHAINS` are verbs that call others: they have no journal of their own.
"""

import os
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import make_tiny
from mtp_models import make_mtp
from safetensors.torch import save_file

from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.training.options import TrainOptions
from moetools.verbs.compress.options import CompressOptions
from moetools.verbs.compress.verb import compress
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.distill.verb import distill
from moetools.verbs.place.options import PlaceOptions
from moetools.verbs.place.verb import place_experts
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.quantize.verb import quantize
from moetools.verbs.reduce.options import MergeOptions, PruneOptions
from moetools.verbs.reduce.verb import merge_experts, prune_experts
from moetools.verbs.route.options import RouteOptions
from moetools.verbs.route.verb import route_tasks
from moetools.verbs.run.options import RunOptions
from moetools.verbs.run.verb import run

# A stated budget: the memory plan is part of the reports that are compared.
CPU = ForwardOptions(device="cpu", memory_budget=10**9)
LAYERS = 3
SOLVERS = {
    "statistics": "moetools.passes.layer_reduction.LayerReducer._from_statistics",
    "reduce": "moetools.passes.layer_reduction.LayerReducer._reduced",
    "quantize": "moetools.passes.quantize_layer.LayerQuantizer.quantize",
    "fit": "moetools.passes.student_layers.StudentFitter.fit",
    "train": "moetools.verbs.train.training.train",
    "measure": "moetools.verbs.reduce.work.collect_statistics",
    "choose": "moetools.verbs.route.work.collect_statistics",
    "place": "moetools.verbs.place.work.collect_statistics",
    "widths": "moetools.verbs.quantize.work.choose_widths",
}
"""What a run solves or measures, once per layer or once per run."""


@dataclass(frozen=True)
class Material:
    """What the verbs read, all of it below `folder`."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Material":
        """Models of 3 layers and 8 experts (two; quantized; with an MTP layer), 28 sequences for each of 2 tasks."""
        made = cls(folder)
        make_mtp("deepseek_v3", made.mtp)
        make_tiny("mixtral", made.model)
        make_tiny("mixtral", made.student, seed=1)
        folder.joinpath("text").mkdir()
        generator = torch.Generator().manual_seed(3)
        for number, task in enumerate(("low", "high")):
            low = 2 + 63 * number
            ids = torch.randint(low, low + 63, (28, 16), generator=generator)
            save_file({"input_ids": ids}, made.tokens(task))
        quantize(made.model, made.packed, QuantizeOptions(method="rtn", group_size=8), DataOptions(), CPU, Writing())
        return made

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def packed(self) -> Path:
        return self.folder / "packed"

    @property
    def mtp(self) -> Path:
        return self.folder / "mtp"

    def tokens(self, task: str) -> Path:
        return self.folder / "text" / f"{task}.safetensors"

    def text(self, *tasks: str) -> DataOptions:
        return DataOptions(
            data=[f"{task}={self.tokens(task)}" for task in tasks or ("low",)], seq_len=16, batch_size=14
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """A writing verb with options.

    Attributes:
        run: (material, out, writing, more options) -> report.
        reads: what of the material it reads.
        solves: how often a whole run solves what (`SOLVERS`).
        stops: (staging folder, unit) behind which a run is interrupted -> what it has solved by then.
        beside: the one folder that an interrupted run leaves beside OUT.
        grows: OUT holds the outputs of several steps, each of them absent or complete.
    """

    run: Callable[..., Any]
    reads: tuple[str, ...] = ("model", "low")
    solves: dict[str, int]
    stops: dict[tuple[str, str], dict[str, int]]
    beside: str = ".out.moetools-staging"
    grows: bool = False

    @property
    def threads(self) -> int:
        """Up to how many leave every byte as it is. Some processors split even these products when they train."""
        return 1 if "train" in self.solves else 2

    def paths(self, material: Material) -> Iterator[Path]:
        for name in self.reads:
            yield material.tokens(name) if name in ("low", "high") else getattr(material, name)


def _prune(**asked: Any) -> Callable[..., Any]:
    return lambda m, out, how, **more: prune_experts(
        m.model, out, PruneOptions(keep=4, **asked, **more), m.text(), CPU, how
    )


def _prune_mtp(m: Material, out: Path, how: Writing) -> Any:
    options = PruneOptions(keep=6, method="reap", sequential=True, refit="joint")
    return prune_experts(m.mtp, out, options, m.text(), CPU, how)


def _merge(**asked: Any) -> Callable[..., Any]:
    return lambda m, out, how, **more: merge_experts(
        m.model, out, MergeOptions(to=4, **asked, **more), m.text(), CPU, how
    )


def _quantize(**asked: Any) -> Callable[..., Any]:
    return lambda m, out, how: quantize(m.model, out, QuantizeOptions(group_size=8, **asked), m.text(), CPU, how)


def _quantize_guided(m: Material, out: Path, how: Writing) -> Any:
    options = QuantizeOptions(method="gptq", scheme="w2a16", group_size=8, reference=m.student)
    return quantize(m.model, out, options, m.text(), CPU, how)


def _expand(m: Material, out: Path, how: Writing) -> Any:
    return quantize(m.packed, out, QuantizeOptions(expand=True), DataOptions(), CPU, how)


def _distill(steps: int | None, *, trained: bool = False) -> Callable[..., Any]:
    def run(m: Material, out: Path, how: Writing, **more: Any) -> Any:
        options = StudentOptions(student=m.student) if trained else StudentOptions(local_steps=2, width=40)
        training = TrainOptions(steps=steps, train_batch_size=4, learning_rate=1e-3, log_every=2, **more)
        return distill(m.model, out, options, training, m.text(), CPU, how)

    return run


def _route(**asked: Any) -> Callable[..., Any]:
    options = RouteOptions(keep=4, classifier="none", report=False, **asked)
    return lambda m, out, how: route_tasks(m.model, out, options, m.text("low", "high"), CPU, how)


def _place(m: Material, out: Path, how: Writing) -> Any:
    return place_experts(m.model, out, PlaceOptions(devices=2), m.text(), CPU, how)


FIRST, SECOND = ("out", "layer-00000"), ("out", "layer-00001")
CASES = {
    "prune one-shot": Case(
        run=_prune(method="reap"),
        solves={"measure": 1, "statistics": LAYERS},
        stops={SECOND: {"measure": 1, "statistics": 2}},
    ),
    "prune sequential joint": Case(
        run=_prune(method="reap", sequential=True, refit="joint"),
        solves={"reduce": LAYERS},
        stops={FIRST: {"reduce": 1}, ("out", "layer-00002"): {"reduce": 3}},
    ),
    "prune with MTP": Case(
        run=_prune_mtp,
        reads=("mtp", "low"),
        solves={"reduce": LAYERS},
        stops={SECOND: {"reduce": 1}},
    ),
    "merge joint": Case(run=_merge(), solves={"reduce": LAYERS}, stops={SECOND: {"reduce": 2}}),
    "merge healed": Case(
        run=_merge(method="m-smoe", refit="none", heal=3),
        solves={"measure": 1, "statistics": LAYERS, "train": 1},
        stops={
            ("student", "layer-00001"): {"measure": 1, "statistics": 2},
            SECOND: {"measure": 1, "statistics": 3, "train": 1},
        },
    ),
    "quantize gptq": Case(run=_quantize(method="gptq"), solves={"quantize": LAYERS}, stops={SECOND: {"quantize": 2}}),
    "quantize guided": Case(
        run=_quantize_guided, reads=("model", "student"), solves={"quantize": LAYERS}, stops={SECOND: {"quantize": 2}}
    ),
    "quantize embeddings": Case(
        run=_quantize(method="gptq", embeddings="w8a16", format="moetools"),
        solves={"quantize": LAYERS},
        stops={("out", "layer-00002"): {"quantize": 3}},
    ),
    "quantize mixed": Case(
        run=_quantize(scheme="mixed", method="hqq", bits=3.0),
        solves={"quantize": LAYERS, "widths": 1},
        stops={FIRST: {"quantize": 1, "widths": 1}},
    ),
    "place-experts": Case(
        run=_place,
        solves={"place": 1, "statistics": LAYERS},
        stops={SECOND: {"place": 1, "statistics": 2}},
    ),
    "expand": Case(run=_expand, reads=("packed",), solves={}, stops={SECOND: {}}),
    "distill closed form": Case(run=_distill(None), solves={"fit": LAYERS}, stops={SECOND: {"fit": 2}}),
    "distill trained": Case(
        run=_distill(3),
        solves={"fit": LAYERS, "train": 1},
        stops={("student", "layer-00001"): {"fit": 2}, SECOND: {"fit": 3, "train": 1}},
    ),
    "distill student": Case(
        run=_distill(3, trained=True),
        reads=("model", "low", "student"),
        solves={"train": 1},
        stops={SECOND: {"train": 1}},
    ),
    "route-tasks": Case(
        run=_route(),
        reads=("model", "low", "high"),
        solves={"choose": 1, "reduce": 2 * LAYERS},
        stops={("low", "layer-00000"): {"choose": 1, "reduce": 1}, ("high", "layer-00001"): {"choose": 1, "reduce": 5}},
    ),
    "route-tasks tuned": Case(
        run=_route(refit="none", tune_router=2),
        reads=("model", "low", "high"),
        solves={"choose": 1, "statistics": 2 * LAYERS, "train": 2},
        stops={
            ("high", "layer-00001"): {"choose": 1, "statistics": 6, "train": 2},
        },
    ),
}


def _compress(m: Material, out: Path, how: Writing) -> Any:
    options = CompressOptions(target_size="60%", min_experts=4, checks=2, probe_tokens=64)
    return compress(m.model, out, options, m.text(), CPU, how)


def _run(m: Material, out: Path, how: Writing) -> Any:
    shared = {"verify": how.verify, "device": "cpu", "memory_budget": 10**9}
    text = {"data": f"low={m.tokens('low')}", "seq_len": 16}
    pruned = {"name": "pruned", "verb": "prune-experts", "model": str(m.model), "options": {"keep": 4, **text}}
    packed = {"name": "packed", "verb": "quantize", "model": "${pruned}",
              "options": {"method": "gptq", "group_size": 8, **text}}  # fmt: skip
    judged = {"reference": str(m.model), **text}
    # A folder of its own: two runs at once read one file each.
    recipe = out.parent.parent / f"recipe-{os.getpid()}.yaml"
    recipe.write_text(yaml.safe_dump({"out": str(out), "options": shared, "steps": [pruned, packed], "report": judged}))
    return run(recipe, RunOptions())


CHAINS = {
    "compress": Case(run=_compress, solves={}, stops={}, beside=".out.moetools-compress"),
    "run": Case(run=_run, solves={}, stops={}, beside=".out.moetools-dry-run", grows=True),
}


@contextmanager
def watching() -> Iterator[Counter[str]]:
    """Counts what is solved while it is open."""
    solved: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name, target in SOLVERS.items():
            owner, _, attribute = target.rpartition(".")
            patch.setattr(target, _counted(getattr(pkgutil.resolve_name(owner), attribute), name, solved))
        yield solved


def _counted(function: Callable[..., Any], name: str, solved: Counter[str]) -> Callable[..., Any]:
    def counted(*args: Any, **more: Any) -> Any:
        solved[name] += 1
        return function(*args, **more)

    return counted
