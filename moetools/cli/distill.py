"""`moetools distill`."""

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from moetools.cli import options as opt
from moetools.cli.console import Session
from moetools.plugins import plugin_names

INITS = plugin_names("moetools.methods.distill")
STUDENT, TRAINING, TEACHER = "Student", "Training", "Teacher's predictions"


def _option(panel: str, name: str, *, help: str, metavar: str | None = "N", **more: Any) -> Any:  # noqa: A002
    return typer.Option(name, help=help, metavar=metavar, rich_help_panel=panel, **more)


Teacher = Annotated[
    Path,
    typer.Argument(metavar="TEACHER", help="Folder of the Mixture-of-Experts checkpoint.", show_default=False),
]
Init = Annotated[
    str,
    _option(
        STUDENT,
        "--init",
        metavar="NAME",
        help=f"How each FFN starts: one of {', '.join(INITS)}.",
        autocompletion=lambda: INITS,
    ),
]
Width = Annotated[
    int | None, _option(STUDENT, "--width", help="Neurons of every FFN; as many as a token uses in the teacher.")
]
Layers = Annotated[int | None, _option(STUDENT, "--layers", help="Decoder layers, evenly spaced; all if not given.")]
Scaling = Annotated[
    str,
    _option(
        STUDENT,
        "--scaling",
        metavar="HOW",
        help="Experts' neurons are scaled by the mean routing weight (uniform) or each expert's own (marginal).",
        autocompletion=lambda: ["uniform", "marginal"],
    ),
]
WarmStart = Annotated[
    bool,
    _option(
        STUDENT,
        "--warm-start/--no-warm-start",
        metavar=None,
        help="Fit every FFN to what its MoE block did, in closed form and layer after layer.",
    ),
]
LocalSteps = Annotated[
    int, _option(STUDENT, "--local-steps", help="Gradient steps of the warm start on each FFN alone; 0 for none.")
]
Calibration = Annotated[
    list[str] | None,
    _option(
        STUDENT,
        "--calibration",
        metavar="NAME=PATH",
        help="Text to fit the layers on, in place of the first 64 sequences of every task (all of them if nothing is "
        "trained).",
    ),
]
Existing = Annotated[
    Path | None,
    _option(STUDENT, "--student", metavar="DIR", help="Train this checkpoint instead of making a student: healing."),
]
Steps = Annotated[int | None, _option(TRAINING, "--steps", help="Optimizer steps.")]
Epochs = Annotated[float | None, _option(TRAINING, "--epochs", help="Passes over the text.")]
MaxMinutes = Annotated[
    float | None,
    _option(TRAINING, "--max-minutes", help="Wall time of the training; the learning rate falls to zero in it."),
]
Part = Annotated[
    str,
    _option(
        TRAINING,
        "--train",
        metavar="WHAT",
        help="all; or of a Mixture-of-Experts student router, or experts (routers and experts).",
        autocompletion=lambda: ["all", "experts", "router"],
    ),
]
TrainBatch = Annotated[int, _option(TRAINING, "--train-batch-size", help="Sequences per process and forward pass.")]
Accumulate = Annotated[int, _option(TRAINING, "--accumulate", help="Forward passes per optimizer step.")]
Rate = Annotated[float, _option(TRAINING, "--learning-rate", metavar="R", help="Of AdamW.")]
Relative = Annotated[
    bool,
    _option(
        TRAINING,
        "--relative-rate/--absolute-rate",
        metavar=None,
        help="The learning rate counts in root mean squares of each tensor.",
    ),
]
Decay = Annotated[float, _option(TRAINING, "--weight-decay", metavar="R", help="Of AdamW, for matrices.")]
Alpha = Annotated[
    float,
    _option(TRAINING, "--alpha", metavar="A", help="Loss: A * cross-entropy + (1 - A) * divergence from the teacher."),
]
Temperature = Annotated[float, _option(TRAINING, "--temperature", metavar="T", help="Of the divergence.")]
DivergenceName = Annotated[
    str,
    _option(
        TRAINING,
        "--divergence",
        metavar="NAME",
        help="forward KL, reverse KL or jsd.",
        autocompletion=lambda: ["forward", "reverse", "jsd"],
    ),
]
Hidden = Annotated[
    float, _option(TRAINING, "--hidden-weight", metavar="R", help="Weight of the distance of hidden states.")
]
Bf16 = Annotated[
    bool, _option(TRAINING, "--bf16", metavar=None, help="Compute in bfloat16; weights and optimizer stay float32.")
]
Checkpointing = Annotated[
    bool,
    _option(TRAINING, "--gradient-checkpointing", metavar=None, help="Recompute activations instead of keeping them."),
]
Fsdp = Annotated[
    bool,
    _option(TRAINING, "--fsdp", metavar=None, help="Shard the student over all processes (FSDP2); use torchrun."),
]
LogEvery = Annotated[int, _option(TRAINING, "--log-every", help="Steps between lines of OUT/metrics.jsonl.")]
SaveEvery = Annotated[
    int, _option(TRAINING, "--save-every", help="Steps between checkpoints that --resume goes on from; 0 for none.")
]
Tensorboard = Annotated[
    Path | None,
    _option(TRAINING, "--tensorboard", metavar="DIR", help="Also write event files there (extra: tensorboard)."),
]
Baseline = Annotated[
    str | None,
    _option(
        TRAINING,
        "--train-baseline",
        metavar="START",
        help="Also train without the teacher for the same steps, from random weights (scratch) or the same student "
        "(student), and report the share of the sparse gain kept.",
        autocompletion=lambda: ["scratch", "student"],
    ),
]
Cache = Annotated[
    Path | None,
    _option(
        TEACHER,
        "--teacher-cache",
        metavar="DIR",
        help="Capture the teacher's most likely tokens there, layer by layer, and train on them: the teacher never "
        "has to fit in memory.",
    ),
]
CacheTop = Annotated[int, _option(TEACHER, "--cache-top", help="Tokens per position in the cache.")]


def command(
    context: typer.Context,
    teacher: Teacher,
    out: opt.Out,
    init: Init = "neurons",
    width: Width = None,
    layers: Layers = None,
    scaling: Scaling = "uniform",
    warm_start: WarmStart = True,
    local_steps: LocalSteps = 300,
    calibration: Calibration = None,
    student: Existing = None,
    steps: Steps = None,
    epochs: Epochs = None,
    max_minutes: MaxMinutes = None,
    train: Part = "all",
    train_batch_size: TrainBatch = 8,
    accumulate: Accumulate = 1,
    learning_rate: Rate = 1e-3,
    relative_rate: Relative = False,
    weight_decay: Decay = 0.0,
    alpha: Alpha = 0.0,
    temperature: Temperature = 1.0,
    divergence: DivergenceName = "forward",
    hidden_weight: Hidden = 0.0,
    bf16: Bf16 = False,
    gradient_checkpointing: Checkpointing = False,
    fsdp: Fsdp = False,
    log_every: LogEvery = 10,
    save_every: SaveEvery = 0,
    tensorboard: Tensorboard = None,
    train_baseline: Baseline = None,
    teacher_cache: Cache = None,
    cache_top: CacheTop = 64,
    data: opt.Data = None,
    seq_len: opt.SeqLen = 512,
    samples: opt.Samples = None,
    batch_size: opt.BatchSize = None,
    pack: opt.Pack = True,
    shuffle: opt.Shuffle = False,
    seed: opt.Seed = 0,
    tokenizer: opt.Tokenizer = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    memory_budget: opt.MemoryBudget = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    verify: opt.Verify = True,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Make a dense student of a Mixture-of-Experts model, or train a student towards its teacher.

    The student is fitted layer by layer. With --steps, --epochs or --max-minutes it is then trained on the teacher's
    predictions; with --student an existing checkpoint is (healing of a merged or pruned model).
    """
    with Session(as_json=as_json, quiet=quiet, debug=debug, resumable=not dry_run) as session:
        from moetools.training.loss import LossOptions
        from moetools.training.options import TrainOptions
        from moetools.verbs.distill.student import StudentOptions
        from moetools.verbs.distill.verb import DistillOptions, distill
        from moetools.verbs.train.plan import StudentTraining

        text = opt.data_options(
            data,
            seq_len=seq_len,
            samples=samples,
            batch_size=batch_size,
            pack=pack,
            shuffle=shuffle,
            seed=seed,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
        )
        forward = opt.forward_options(
            device=device, dtype=dtype, memory_budget=memory_budget, trust_remote_code=trust_remote_code
        )
        loop = TrainOptions(
            steps=steps,
            epochs=epochs,
            minutes=max_minutes,
            batch_size=train_batch_size,
            accumulate=accumulate,
            learning_rate=learning_rate,
            relative=relative_rate,
            weight_decay=weight_decay,
            loss=LossOptions(alpha=alpha, temperature=temperature, divergence=divergence),  # type: ignore[arg-type]
            hidden_weight=hidden_weight,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
            log_every=log_every,
            save_every=save_every,
            fsdp=fsdp,
            tensorboard=tensorboard,
            seed=seed,
        )
        choice = DistillOptions(
            make=StudentOptions(
                init=init,
                width=width,
                layers=layers,
                scaling=scaling,  # type: ignore[arg-type]
                warm_start=warm_start,
                local_steps=local_steps if warm_start else 0,
                seed=seed,
            ),
            training=StudentTraining(
                part=train,  # type: ignore[arg-type]
                train=loop,
                baseline=train_baseline,  # type: ignore[arg-type]
                cache=teacher_cache,
                cache_top=cache_top,
            ),
            student=student,
            calibration=replace(text, data=calibration, samples=None) if calibration and text else None,
            overwrite=overwrite,
            resume=resume,
            dry_run=dry_run,
            verify=verify,
        )
        line = shlex.join(["moetools", *(context.obj or ())])
        report = distill(teacher, out, text, forward, choice, command=line, progress=session.progress)
        # Of several processes (torchrun) one speaks.
        if os.environ.get("RANK", "0") == "0":
            session.result(report)
