"""Verbs in a process of its own under a hard limit of memory: `memory_child.py FOLDER VERB=BUDGET...`.

Every verb first runs on the tiny model of the folder, so that what it imports is no part of what is measured. One line
of JSON for each: the most anonymous memory of its run on the large (or short) model above what there was before it, the
peak that was planned, or the message of its refusal; the same of a dry run before.
"""

import json
import logging
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moetools.checkpoint.writer import CheckpointWriter
from moetools.errors import UserError
from moetools.forward.memory import give_back_memory
from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.training.options import TrainOptions
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.distill.verb import distill
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate
from moetools.verbs.inspect.options import RoutingOptions
from moetools.verbs.inspect.routing import inspect_routing
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.quantize.verb import quantize
from moetools.verbs.reduce.options import MergeOptions, PruneOptions
from moetools.verbs.reduce.verb import merge_experts, prune_experts
from moetools.verbs.route.options import RouteOptions
from moetools.verbs.route.verb import route_tasks

SLACK = 4 * 2**20
"""For allocators and Python's own objects, beside the budget."""
SHARD = 2**21
"""Of what is written, less than a layer: a file for each."""
MAPPED = 16 * 2**20
"""Half a dozen layers' files: torch maps them privately, and the kernel counts that as data."""


class Folder:
    """The models and texts that the parent made, and where outputs go."""

    def __init__(self, folder: Path, model: str, out: str) -> None:
        self.model, self.other, self.out = folder / model, folder / f"{model}-other", folder / out
        self._texts = folder

    def text(self, *tasks: str) -> DataOptions:
        return DataOptions(
            data=[f"{task}={self._texts / task}.safetensors" for task in tasks or ("low",)], seq_len=16, batch_size=4
        )


def _quick(how: Writing) -> Writing:
    """Without verification, which is the same for all verbs."""
    return Writing(dry_run=how.dry_run, verify=False)


VERBS: dict[str, Callable[[Folder, ForwardOptions, Writing], Any]] = {
    "prune": lambda f, cpu, how: prune_experts(f.model, f.out, PruneOptions(keep=2), f.text(), cpu, how),
    "merge": lambda f, cpu, how: merge_experts(f.model, f.out, MergeOptions(to=2), f.text(), cpu, _quick(how)),
    "quantize": lambda f, cpu, how: quantize(f.model, f.out, QuantizeOptions(), f.text(), cpu, how),
    "route": lambda f, cpu, how: route_tasks(
        f.model,
        f.out,
        RouteOptions(keep=2, classifier="none", report=False),
        f.text("low", "high"),
        cpu,
        _quick(how),
    ),
    "distill": lambda f, cpu, how: distill(
        f.model, f.out, StudentOptions(width=256, local_steps=20), TrainOptions(steps=None), f.text(), cpu, _quick(how)
    ),
    "evaluate": lambda f, cpu, _: evaluate([f.model], EvaluateOptions(reference=f.other), f.text(), cpu),
    "inspect": lambda f, cpu, _: inspect_routing(f.model, RoutingOptions(), f.text(), cpu),
}


MEASURING = ("evaluate", "inspect")
"""They have no dry run."""


def status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def measured(run: Callable[[], Any], budget: int) -> dict[str, Any]:
    """What `run` took, under a limit that it cannot pass."""
    give_back_memory()
    baseline, seen, done = status_bytes("RssAnon"), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            seen[0] = max(seen[0], status_bytes("RssAnon") - baseline)

    sampler = threading.Thread(target=sample)
    sampler.start()
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + budget + SLACK + MAPPED, hard))
    found: dict[str, Any] = {}
    try:
        plan = getattr(run(), "memory", None)
        found["planned"] = None if plan is None else plan.peak
    except UserError as error:
        found["refused"] = error.message
    except RuntimeError as error:
        found["failed"] = str(error).splitlines()[0]
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        done.set()
        sampler.join()
    return {**found, "peak": seen[0]}


def main(folder: str, *asked: str) -> None:
    logging.disable()
    torch.set_num_threads(1)
    threading.stack_size(1 << 20)
    assert CheckpointWriter.__init__.__kwdefaults__ is not None
    CheckpointWriter.__init__.__kwdefaults__["max_shard_bytes"] = SHARD
    for number, one in enumerate(asked):
        verb, _, budget = one.partition("=")
        cpu, how = ForwardOptions(device="cpu", memory_budget=int(budget)), Writing()
        many = "large" if verb in ("prune", "inspect", "evaluate") else "short"
        small, large = (Folder(Path(folder), name, f"{name}-{verb}-{number}") for name in ("tiny", many))
        VERBS[verb](small, ForwardOptions(device="cpu", memory_budget="1GB"), how)
        dry: dict[str, Any] = {}
        if verb not in MEASURING:
            dry = measured(lambda: VERBS[verb](large, cpu, Writing(dry_run=True)), int(budget))  # noqa: B023
        found = {**measured(lambda: VERBS[verb](large, cpu, how), int(budget)), "dry": dry}  # noqa: B023
        sys.stdout.write(json.dumps({"verb": verb, **found, "made": large.out.exists()}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
