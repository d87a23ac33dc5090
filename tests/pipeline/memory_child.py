"""One verb in a process of its own under a hard limit of memory.

Prints one line of JSON: the most anonymous memory above the imports, and what the report says.
"""

import json
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.models.mixtral import modeling_mixtral  # noqa: F401 - imports are no part of what is measured

from moetools.checkpoint import writer
from moetools.errors import UserError
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

SHARD = 16 * 2**20
VERBS: dict[str, Callable[..., Any]] = {
    "prune": lambda m, out, text, cpu, how: prune_experts(m, out, PruneOptions(keep=8), text("low"), cpu, how),
    "merge": lambda m, out, text, cpu, how: merge_experts(m, out, MergeOptions(to=8), text("low"), cpu, how),
    "quantize": lambda m, out, text, cpu, how: quantize(m, out, QuantizeOptions(), text("low"), cpu, how),
    "route": lambda m, out, text, cpu, how: route_tasks(
        m, out, RouteOptions(keep=8, classifier="none", report=False), text("low", "high"), cpu, how
    ),
    "distill": lambda m, out, text, cpu, how: distill(
        m, out, StudentOptions(width=256), TrainOptions(steps=None), text("low"), cpu, how
    ),
    "evaluate": lambda m, out, text, cpu, how: evaluate(
        [m], EvaluateOptions(reference=m.parent / "other"), text("low"), cpu
    ),
    "inspect": lambda m, out, text, cpu, how: inspect_routing(m, RoutingOptions(), text("low"), cpu),
}


def status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def main(verb: str, model: str, texts: str, out: str, budget: str, slack: str) -> None:
    torch.set_num_threads(1)
    threading.stack_size(1 << 20)
    torch.randn(512, 512) @ torch.randn(512, 512)
    writer.CheckpointWriter.__init__.__kwdefaults__["max_shard_bytes"] = SHARD

    def text(*tasks: str) -> DataOptions:
        files = [f"{task}={Path(texts) / task}.safetensors" for task in tasks]
        return DataOptions(data=files, seq_len=16, batch_size=4)

    baseline, peak, done = status_bytes("RssAnon"), 0, threading.Event()
    if int(slack):
        resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + int(budget) + int(slack),) * 2)

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, status_bytes("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    found: dict[str, Any] = {}
    try:
        cpu = ForwardOptions(device="cpu", memory_budget=int(budget))
        report = VERBS[verb](Path(model), Path(out), text, cpu, Writing())
        plan = getattr(report, "memory", None)
        found = {"plan": None if plan is None else plan.peak, "prefetch": plan and plan.prefetch}
    except UserError as error:
        found = {"error": error.message}
    finally:
        done.set()
        sampler.join()
    print(json.dumps({**found, "peak": peak - baseline}))


if __name__ == "__main__":
    main(*sys.argv[1:])
