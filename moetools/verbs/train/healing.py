"""Short training of a reduced model towards the original's predictions, from a folder on disk to a folder on disk."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import UserError
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.text.options import DataOptions, load_tokens
from moetools.text.tokens import TokenData
from moetools.training.models import common_vocabulary
from moetools.training.options import TrainOptions
from moetools.verbs.reduce.reduction import CompressOptions, Reduction
from moetools.verbs.reduce.report import CompressReport, describe_output, model_card
from moetools.verbs.train.plan import PARTS, StudentTraining, TrainingPlan, TrainPart
from moetools.verbs.train.training import TrainingReport, TrainingRun, known_tokens

_BATCH = 4
_HELD_OUT_MOST = 32
LEARNING_RATES: dict[TrainPart, float] = {"router": 0.03, "experts": 0.006, "all": 0.006}
"""Steps relative to the root mean square of each tensor (docs/benchmarks.md)."""


@dataclass(frozen=True, kw_only=True)
class Healing:
    """What healing is made of, checked before the reduction that it follows."""

    tokens: TokenData
    tokenizer: Path | None
    training: StudentTraining


def check_heal(options: CompressOptions, data: DataOptions | None) -> DataOptions:
    """The text to heal on: the one named for it, else all that the reduction's own has, in random order.

    No more sequences of a task are read than the steps take.

    Raises:
        UserError: no text, a negative number of steps, or an unknown part to train.
    """
    if options.heal_train not in PARTS:
        raise UserError(f"--heal-train '{options.heal_train}' is unknown; legal: {', '.join(PARTS)}")
    if options.heal < 1:
        raise UserError(f"--heal {options.heal} is below 1")
    text = options.heal_data or data
    if text is None or not text.data:
        raise UserError("--heal trains on text", hint="--heal-data FILE, or --data FILE (or NAME=FILE, repeated)")
    return replace(text, samples=options.heal * _BATCH + _HELD_OUT_MOST, shuffle=True, seed=options.seed)


def plan_healing(reduction: Reduction, text: DataOptions, options: CompressOptions) -> Healing:
    """Refuse healing that could not run, before the reduction that it follows has begun.

    Raises:
        UserError: a part the reduced model does not have, or too little memory, with the numbers.
        DataError: text that cannot be read, or too little.
    """
    teacher = reduction.model
    tokens = load_tokens(text, reduction.source, teacher.vocab_size)
    common_vocabulary(teacher.vocab_size, teacher.vocab_size, known_tokens(teacher, tokens, text.tokenizer))
    student = StreamedModel(reduction.source, reduction.forward, config=reduction.config)
    if options.heal_train != "all" and not student.stock.moe_layers:
        raise UserError(f"--heal-train {options.heal_train}: the reduced model has no experts", hint="--heal-train all")
    training = heal_training(
        teacher,
        student,
        tokens,
        reduction.forward,
        steps=options.heal,
        part=options.heal_train,  # type: ignore[arg-type]
        seed=options.seed,
    )
    return Healing(tokens=tokens, tokenizer=text.tokenizer, training=training)


def heal_training(
    teacher: StreamedModel,
    student: StreamedModel,
    tokens: TokenData,
    forward: ForwardOptions,
    *,
    steps: int,
    part: TrainPart,
    seed: int,
) -> StudentTraining:
    """Settings of healing: steps on 4 sequences, fewer at a time where memory is short.

    Raises:
        UserError: not even one sequence at a time fits.
        DataError: too little text.
    """
    for rows in (_BATCH, _BATCH // 2, 1):
        loop = TrainOptions(
            steps=steps,
            batch_size=rows,
            accumulate=_BATCH // rows,
            learning_rate=LEARNING_RATES[part],
            relative=True,
            bf16=student.dtype == torch.bfloat16,
            seed=seed,
        )
        training = StudentTraining(part=part, train=loop)
        plan = TrainingPlan(teacher, student, tokens, forward, training)
        if plan.fits:
            break
    plan.check_memory("raise --memory-budget, or shorten --seq-len")
    return training


def heal_checkpoint(
    report: CompressReport,
    reduced: Path,
    out: Path,
    forward: ForwardOptions,
    healing: Healing,
    *,
    overwrite: bool,
    verify: bool,
    progress: Progress | None,
) -> CompressReport:
    """Heal the checkpoint `reduced`, write the result to `out`, verify it and remove `reduced`.

    Args:
        report: of the run that wrote `reduced`; its `input_path` names the teacher.

    Returns:
        The same report, with what healing did.
    """

    def healed(training: TrainingReport, folder: Path) -> CompressReport:
        return replace(
            report,
            out=str(out),
            after=describe_output(open_checkpoint(folder)),
            verified=verify,
            seconds={**report.seconds, "heal": training.seconds},
            healing=healing_facts(training),
        )

    def describe(training: TrainingReport, folder: Path) -> tuple[Mapping[str, Any], str]:
        found = healed(training, folder)
        return found.to_json(), model_card(found, run.student.arch.model_type)

    run = TrainingRun(
        Path(report.input_path),
        reduced,
        out,
        healing.tokens,
        forward,
        healing.training,
        tokenizer=healing.tokenizer,
        overwrite=overwrite,
        verify=verify,
        progress=progress,
    )
    training = run.run(describe)
    shutil.rmtree(reduced)
    return healed(training, out)


def healing_facts(training: TrainingReport) -> dict[str, Any]:
    """What a report says of a training: steps, what was trained, and the held-out KL on the way."""
    return {
        "steps": training.steps,
        "trained": training.part,
        "best_step": training.best_step,
        "tokens": training.tokens,
        "curve": [(int(point["step"]), point["divergence"]) for point in training.curve],
    }
