"""What a dense student keeps: `python tests/benchmarks/bench_distill.py [mixtral|embedded] inits|train|heal [AMOUNT]`.

`inits`: every initialisation alone, after the closed-form fit, after local steps, and after AMOUNT (60) steps of
training each, on 40 windows per task. `train`: AMOUNT (15) minutes of training of the default student, the share of
the sparse gain kept against a student trained from scratch without the teacher for as many steps, size and speed.
`heal`: an 8 -> 4 (16 -> 8) merged model trained for AMOUNT minutes. Markdown rows; KL(original || result), top-1
agreement and perplexity on held-out text.
"""

import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from moetools.demo import demo_data_path, demo_model_path
from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.plugins import plugin_names
from moetools.text.options import DataOptions
from moetools.training.options import TrainOptions
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.distill.report import DistillReport
from moetools.verbs.distill.verb import distill
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate
from moetools.verbs.reduce.options import MergeOptions
from moetools.verbs.reduce.verb import merge_experts

SHARED = Path(__file__).resolve().parents[3] / "shared"
CPU = ForwardOptions(device="cpu")
RATE = 6e-4


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model with its texts."""

    model: Path
    calibration: DataOptions
    training: DataOptions
    test: DataOptions


def setup(name: str) -> Setup:
    if name == "mixtral":
        folder, tasks = SHARED / "data", ("code", "math", "plays", "reviews", "german")
        model, calibration = SHARED / "models" / "mixtral-8x9m", [f"cal={folder}/calibration.safetensors"]
        names = ("train", "test")
    else:
        folder, tasks, model = demo_data_path(), ("arithmetic", "code", "french", "prose"), demo_model_path()
        calibration = [f"{task}={folder}/{task}/calibration.jsonl" for task in tasks]
        names = ("calibration", "test")
    training, test = ([f"{task}={folder}/{task}/{name}.jsonl" for task in tasks] for name in names)
    return Setup(
        model=model,
        calibration=DataOptions(data=calibration, seq_len=256, samples="all"),
        training=DataOptions(data=training, seq_len=256, samples="all", shuffle=True),
        test=DataOptions(data=test, seq_len=256),
    )


def main(name: str, what: str, amount: float) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        {"inits": inits, "train": train, "heal": heal}[what](setup(name), Path(folder), amount)


def inits(on: Setup, folder: Path, steps: float) -> None:
    head = f"| initialisation | alone | closed form | + 300 local steps | + {steps:g} steps |"
    print(head + "\n|" + "---|" * 5, flush=True)
    some = replace(on, test=replace(on.test, samples=40))
    loop = TrainOptions(steps=int(steps), learning_rate=RATE)
    for init in plugin_names("moetools.methods.distill"):
        row = []
        for stage in ("alone", "closed", "local", "trained"):
            out = folder / stage
            if stage == "trained":
                run(on, out, student=folder / "local", training=loop)
            elif stage == "alone" and init == "neurons":
                row.append("-")
                continue
            else:
                steps_each = 300 if stage == "local" else 0
                run(on, out, make=StudentOptions(init=init, warm_start=stage != "alone", local_steps=steps_each))
            found = measured(some, out)
            row.append(f"{found['agreement']['kl']:.4f} ({found['perplexity']:.2f})")
        print(f"| {init} | " + " | ".join(row) + " |", flush=True)


def train(on: Setup, folder: Path, minutes: float) -> None:
    print("| model | MB | KL | top-1 % | perplexity | tokens/s | seconds |\n" + "|" + "---|" * 7, flush=True)
    started = time.perf_counter()
    run(on, folder / "fitted", make=StudentOptions(local_steps=0))
    show("closed form", measured(on, folder / "fitted"), time.perf_counter() - started)
    started = time.perf_counter()
    report = run(on, folder / "trained", make=StudentOptions(local_steps=300), training=training(minutes))
    assert report.training is not None
    student = measured(on, folder / "trained")
    show(f"+ local steps, {minutes:g} minutes of training", student, time.perf_counter() - started)
    steps, started = report.training.steps, time.perf_counter()
    dense = scratch(on, folder, steps)
    show(f"from scratch without teacher, {steps} steps", dense, time.perf_counter() - started)
    teacher = evaluate([on.model], EvaluateOptions(), on.test, CPU).to_json()["models"][0]
    show("teacher", teacher, 0.0)
    losses = [math.log(one["perplexity"]) for one in (dense, student, teacher)]
    kept = (losses[0] - losses[1]) / (losses[0] - losses[2])
    print(
        f"\nsparse gain kept: {100 * kept:.1f} %; {report.training.tokens:,} tokens in {report.training.seconds:.0f} s"
    )


def scratch(on: Setup, folder: Path, steps: int) -> dict[str, Any]:
    """A student of the same config with random weights, trained on the text alone."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder / "trained")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "random")
    shutil.copy(on.model / "tokenizer.json", folder / "random")
    loop = TrainOptions(steps=steps, learning_rate=1e-3, alpha=1.0)
    run(on, folder / "scratch", student=folder / "random", training=loop)
    return measured(on, folder / "scratch")


def heal(on: Setup, folder: Path, minutes: float) -> None:
    print("| model | MB | KL | top-1 % | perplexity | tokens/s | seconds |\n" + "|" + "---|" * 7, flush=True)
    half = {"mixtral": 4}.get(on.model.name.split("-")[0], 8)
    started = time.perf_counter()
    merge_experts(on.model, folder / "merged", MergeOptions(to=half), on.calibration, CPU, Writing())
    show(f"merged to {half}", measured(on, folder / "merged"), time.perf_counter() - started)
    started = time.perf_counter()
    report = run(on, folder / "healed", student=folder / "merged", training=training(minutes))
    assert report.training is not None
    label = f"healed, {report.training.steps} steps"
    show(label, measured(on, folder / "healed"), time.perf_counter() - started)


def training(minutes: float | None) -> TrainOptions:
    return TrainOptions(max_minutes=minutes, learning_rate=RATE)


def run(
    on: Setup,
    out: Path,
    *,
    make: StudentOptions | None = None,
    student: Path | None = None,
    training: TrainOptions | None = None,
) -> DistillReport:
    loop = training or TrainOptions()
    options = replace(make or StudentOptions(), student=student, calibration=on.calibration.data)
    data = on.training if loop.wanted else on.calibration
    report = distill(on.model, out, options, loop, data, CPU, Writing(overwrite=True))
    assert report is not None
    return report


def measured(on: Setup, out: Path) -> dict[str, Any]:
    return evaluate([out], EvaluateOptions(reference=on.model), on.test, CPU).to_json()["models"][1]


def show(label: str, found: dict[str, Any], seconds: float) -> None:
    against = found.get("agreement")
    quality = f"{against['kl']:.4f} | {100 * against['top1']:.1f}" if against else "0 | 100"
    speed = f"{found['tokens_per_second']:,.0f} | {seconds:.0f}"
    print(f"| {label} | {found['nbytes'] / 1e6:.2f} | {quality} | {found['perplexity']:.2f} | {speed} |", flush=True)


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else "mixtral",
        sys.argv[2] if len(sys.argv) > 2 else "train",
        float(sys.argv[3]) if len(sys.argv) > 3 else (60.0 if "inits" in sys.argv else 15.0),
    )
