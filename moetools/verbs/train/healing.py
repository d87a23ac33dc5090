"""Short training of a reduced model towards the original's predictions: settings that fit the memory."""

import torch

from moetools.errors import UserError
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.text.tokens import TokenData
from moetools.training.options import TrainOptions
from moetools.verbs.train.plan import TrainingPlan

BATCH = 4
HELD_OUT_MOST = 32
LEARNING_RATES = {"router": 0.03, "experts": 0.006, "all": 0.006}
"""Steps relative to the root mean square of each tensor (docs/benchmarks.md)."""


def heal_training(
    teacher: StreamedModel,
    student: StreamedModel,
    tokens: TokenData,
    forward: ForwardOptions,
    *,
    steps: int,
    part: str,
    seed: int,
) -> TrainOptions:
    """Settings of healing: steps on 4 sequences, fewer at a time where memory is short.

    Raises:
        UserError: a part the student does not have, or not even one sequence at a time fits.
        DataError: too little text.
    """
    if part != "all" and not student.stock.moe_layers:
        raise UserError(f"`heal_train={part}`: the reduced model has no experts", hint="`heal_train=all`")
    for rows in (BATCH, BATCH // 2, 1):
        training = TrainOptions(
            train=part,
            steps=steps,
            train_batch_size=rows,
            accumulate=BATCH // rows,
            learning_rate=LEARNING_RATES[part],
            relative_rate=True,
            bf16=student.dtype == torch.bfloat16,
            seed=seed,
        )
        plan = TrainingPlan(teacher, student, tokens, forward, training)
        if plan.fits:
            break
    plan.check_memory("raise `memory_budget`, or shorten `seq_len`")
    return training
