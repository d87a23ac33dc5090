"""What routing by task or sentence keeps: `python tests/benchmarks/bench_route.py [mixtral|embedded] [quick]`.

Prints Markdown: on-task perplexity of per-task extraction beside task-agnostic pruning to the same size, the off-task
damage, routing levels against routing by token, classifiers, and the speed and memory of an extracted checkpoint.
Experts are chosen on calibration text and judged on other text; `quick` takes 16 windows per task of it.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from moetools.architectures.base import find_architecture
from moetools.checkpoint.reader import open_checkpoint
from moetools.demo import demo_data_path, demo_model_path
from moetools.forward.calibrate import collect_statistics
from moetools.forward.evaluate import Evaluator
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.options import Writing
from moetools.routing.classifier import fit_classifier, judge_classifier, ngram_features, router_features
from moetools.text.options import DataOptions, load_tokens
from moetools.text.tokens import TokenData
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate
from moetools.verbs.reduce.options import PruneOptions
from moetools.verbs.reduce.verb import prune_experts
from moetools.verbs.route.data import TaskData, by_sequence, load_task_data, prefixes, prompts
from moetools.verbs.route.levels import find_sentence_ends, measure_levels
from moetools.verbs.route.options import RouteOptions
from moetools.verbs.route.verb import route_tasks

SHARED = Path(__file__).resolve().parents[3] / "shared"
CPU = ForwardOptions(device="cpu")
JOINT: dict[str, Any] = {"refit": "joint", "sequential": True}

SPEED = """
import json, sys, time, torch, transformers
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
torch.set_num_threads(2)
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024
torch.zeros(1) @ torch.zeros(1)
before = resident()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.randint(2, 2000, (8, 256), generator=torch.Generator().manual_seed(0))
best = 1e9
with torch.inference_mode():
    for _ in range(7):
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        best = min(best, time.perf_counter() - start)
    start = time.perf_counter()
    model.generate(ids[:1, :32], max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=1)
    decode = 64 / (time.perf_counter() - start)
weights = sum(p.numel() * p.element_size() for p in model.parameters())
speed = {"prefill": ids.numel() / best, "decode": decode}
print(json.dumps({**speed, "weights": weights, "resident": resident() - before}))
"""


def main(name: str, *, quick: bool) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(name, Path(folder), quick=quick)
        setup.classifiers()
        setup.extraction()
        setup.levels()
        setup.speed()


class Setup:
    """A model, its tasks' text, and what is measured on them."""

    def __init__(self, name: str, folder: Path, *, quick: bool) -> None:
        self.folder = folder
        if name == "mixtral":
            self.tasks: tuple[str, ...] = ("code", "math", "plays", "reviews", "german")
            self.model, self.keeps = SHARED / "models" / "mixtral-8x9m", (6, 4, 2)
            calibration = [f"{task}={SHARED}/data/{task}/train.jsonl" for task in self.tasks]
            test = [f"{task}={SHARED}/data/{task}/test.jsonl" for task in self.tasks]
            self.data = DataOptions(data=calibration, seq_len=256, samples=26)
        else:
            self.tasks = ("arithmetic", "code", "french", "prose")
            self.model, self.keeps = demo_model_path(), (12, 8, 4)
            calibration = [f"{task}={demo_data_path()}/{task}/calibration.jsonl" for task in self.tasks]
            test = [f"{task}={demo_data_path()}/{task}/test.jsonl" for task in self.tasks]
            self.data = DataOptions(data=calibration, seq_len=256, samples="all")
        self.source = open_checkpoint(self.model)
        self.test = self._cut(test) if quick else test

    def _cut(self, test: list[str]) -> list[str]:
        """The first 16 windows of every task."""
        cut = DataOptions(data=test, seq_len=256, samples=16)
        tokens = load_tokens(cut, self.source, self.source.config["vocab_size"])
        files = []
        for number, task in enumerate(self.tasks):
            ids = torch.cat([batch.input_ids for batch in tokens.batches if int(batch.task[0]) == number])
            save_file({"input_ids": ids}, self.folder / f"{task}.safetensors")
            files.append(f"{task}={self.folder / task}.safetensors")
        return files

    def route(self, out: str, **options: Any) -> dict[str, Any]:
        chosen = RouteOptions(
            **{"refit": "none", "classifier": "none", "report": False, "test": list(self.test), **options}
        )
        return route_tasks(self.model, self.folder / out, chosen, self.data, CPU, Writing(overwrite=True)).to_json()

    def extraction(self) -> None:
        """On-task perplexity of every setting beside task-agnostic pruning, then the off-task damage."""
        print(f"| experts | chosen by | MB | {' | '.join(self.tasks)} | KL on task |", flush=True)
        print("|" + "---|" * (4 + len(self.tasks)), flush=True)
        full_shown, off_task = False, []
        for keep in self.keeps:
            for label, options in SETTINGS.items():
                if keep != self.keeps[1] and label not in FEW:
                    continue
                report = self.route(f"{keep}", keep=keep, **options)
                if not full_shown:
                    print(self._row("all", "full model", report["before"]["bytes"], report["full"], 0.0), flush=True)
                    full_shown = True
                own = {one["sets"]["name"]: one["metrics"]["tasks"][one["sets"]["name"]] for one in report["outputs"]}
                size = report["outputs"][0]["size"]["bytes"]
                print(self._row(str(keep), f"task: {label}", size, {"tasks": own}, _mean_kl(own)), flush=True)
                if label in OFF_TASK:
                    off_task.append((keep, label, report["outputs"]))
            for label, settings in AGNOSTIC.items():
                found, size = self._agnostic(keep, settings)
                print(self._row(str(keep), f"all tasks: {label}", size, {"tasks": found}, _mean_kl(found)), flush=True)
        for keep, label, outputs in off_task:
            print(f"\n{keep} experts, {label}: perplexity (rows: chosen for, columns: tested on)\n", flush=True)
            print(f"| | {' | '.join(self.tasks)} |\n|" + "---|" * (1 + len(self.tasks)), flush=True)
            for one in outputs:
                values = " | ".join(f"{one['metrics']['tasks'][task]['perplexity']:.2f}" for task in self.tasks)
                print(f"| {one['sets']['name']} | {values} |", flush=True)

    def _agnostic(self, keep: int, settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
        out = self.folder / "agnostic"
        options = PruneOptions(keep=keep, **settings)
        prune_experts(self.model, out, options, self.data, CPU, Writing(overwrite=True))
        test = DataOptions(data=self.test, seq_len=256)
        found = evaluate([out], EvaluateOptions(reference=self.model), test, CPU).to_json()["models"][1]
        return found["tasks"], open_checkpoint(out).total_bytes

    def _row(self, keep: str, label: str, nbytes: int, found: dict[str, Any], kl: float) -> str:
        values = " | ".join(f"{found['tasks'][task]['perplexity']:.2f}" for task in self.tasks)
        return f"| {keep} | {label} | {nbytes / 1e6:.2f} | {values} | {kl:.4f} |"

    def levels(self) -> None:
        """The full model, routed by sentence and by sequence."""
        options = RouteOptions(score="output", keep=self.keeps[0], level=["sentence", "sequence"])
        full = StreamedModel(self.source, CPU)
        evaluator = Evaluator(self._task_data().test, reference=full)
        ends_V = find_sentence_ends(self.data, self.source, full.vocab_size)
        print("\n| experts chosen per | | perplexity | KL | top-1 % |\n|---|---|---|---|---|", flush=True)
        for level in options.level_settings():
            (one,) = measure_levels(self.source, [level], evaluator, CPU, ends_V, None)
            assert one.metrics is not None
            assert one.metrics.agreement is not None
            name, ahead = level.label.rsplit(" (", 1)
            quality = f"{one.metrics.agreement.kl:.4f} | {100 * one.metrics.agreement.top1:.1f}"
            print(f"| {name} | {ahead.rstrip(')')} | {one.metrics.perplexity:.2f} | {quality} |", flush=True)
        print(f"| token | causal | {evaluator.reference_metrics().perplexity:.2f} | 0 | 100 |", flush=True)

    def classifiers(self) -> None:
        """Held-out accuracy of both classifiers over the length of the prompt."""
        data = self._task_data()
        print("\n| classifier | prompt tokens | accuracy % | surer than 0.8 % | of them right % |", flush=True)
        print("|" + "---|" * 5, flush=True)
        for kind in ("ngrams", "router"):
            for length in (8, 16, 32, 64):
                parts = [by_sequence(prefixes(one, length)) for one in (data.calibration, data.test)]
                features = [self._features(kind, tokens, length) for tokens, _ in parts]
                labels = [task_S for _, task_S in parts]
                fitted = fit_classifier(kind, self.tasks, features[0], labels[0], prefix=length, threshold=0.8)
                found = judge_classifier(fitted, features[1], labels[1])
                right = "" if found.accuracy_confident is None else f"{100 * found.accuracy_confident:.1f}"
                numbers = f"{100 * found.accuracy:.1f} | {100 * found.confident:.1f} | {right}"
                print(f"| {kind} | {length} | {numbers} |", flush=True)

    def _features(self, kind: str, tokens: TokenData, length: int) -> torch.Tensor:
        if kind == "ngrams":
            return ngram_features(prompts(tokens), length)
        statistics = collect_statistics(StreamedModel(self.source, CPU), tokens, ["router"])
        return router_features(
            [statistics.finalized(layer)["router"]["mean_probability"] for layer in statistics.layers]
        )

    def _task_data(self) -> TaskData:
        config = self.source.config
        count, top_k = (
            find_architecture(config).num_experts(config) or 0,
            find_architecture(config).top_k(config) or 1,
        )
        size = config["vocab_size"]
        return load_task_data(self.data, self.test, self.source, size, top_k=top_k, num_experts=count)

    def speed(self) -> None:
        """Stock transformers in a process of its own, on the full and on extracted checkpoints."""
        print(
            "\n| checkpoint | MB on disk | prefill tokens/s | decode tokens/s | weights in memory MB | resident MB |",
            flush=True,
        )
        print("|" + "---|" * 6, flush=True)
        paths = {"full": self.model}
        paths |= {f"{keep} experts ({self.tasks[0]})": self.folder / str(keep) / self.tasks[0] for keep in self.keeps}
        for label, path in paths.items():
            done = subprocess.run([sys.executable, "-c", SPEED, str(path)], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            size = open_checkpoint(path).total_bytes / 1e6
            memory = f"{found['weights'] / 1e6:.1f} | {found['resident'] / 1e6:.1f}"
            print(f"| {label} | {size:.2f} | {found['prefill']:,.0f} | {found['decode']:.1f} | {memory} |", flush=True)


SETTINGS: dict[str, dict[str, Any]] = {
    "output": {},
    "output, refit joint": {"refit": "joint"},
    "reap, refit joint": {"score": "reap", "refit": "joint"},
    "reap": {"score": "reap"},
    "gate": {"score": "gate"},
    "easy-ep": {"score": "easy-ep"},
    "output, tuned routers": {"tune_router": 40},
}
AGNOSTIC: dict[str, dict[str, Any]] = {"reap": {"method": "reap"}, "reap, refit joint": {"method": "reap", **JOINT}}
OFF_TASK = ("output", "output, refit joint")
FEW = ("output", "output, refit joint", "reap")


def _mean_kl(tasks: dict[str, Any]) -> float:
    return sum(task["agreement"]["kl"] for task in tasks.values()) / len(tasks)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "mixtral", quick="quick" in sys.argv)
