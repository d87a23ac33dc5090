"""What a model writes on its own: greedy continuations on the streaming core, and what goes wrong in them.

Likelihood does not show a model that repeats itself for ever (Holtzman et al. 2020, "The Curious Case of Neural Text
Degeneration"). Every step runs all tokens through all layers again, without a cache of keys and values: the same pass
as everything else, for packed models and those that do not fit in memory too.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from moetools.forward.head import row_logits
from moetools.forward.memory import MemoryPlan
from moetools.forward.streaming import StreamedModel
from moetools.text.tokens import TokenBatch, TokenData

LOOP_TAIL, LOOP_PERIOD = 24, 8
"""A continuation loops if its last 24 tokens, or all of fewer, repeat with a period of at most 8 and of a third."""
START = 16
"""Tokens that must be the reference's for the same start."""
_GRAM = 4


@dataclass(frozen=True, kw_only=True)
class GenerationMetrics:
    """Continuations of one model.

    Attributes:
        prompts: their number.
        tokens: of each continuation at most; one ends before at a token that ends a text.
        ended: share that ended.
        looping: share that did not end and loops.
        distinct: share of runs of 4 tokens that are not the same as another of their continuation; mean over prompts.
        agreed: share of the reference's continuation before the first other token; mean over prompts. None without a
            reference.
        same_start: share of prompts whose first 16 tokens are the reference's.
    """

    prompts: int
    tokens: int
    ended: float
    looping: float
    distinct: float
    agreed: float | None
    same_start: float | None


def prompt_batches(data: TokenData, *, prompts: int, length: int, batch_size: int) -> list[TokenBatch]:
    """The first `length` tokens of evenly spaced sequences of every task that are longer, about `prompts` of each."""
    found: list[TokenBatch] = []
    for task in range(len(data.tasks)):
        rows = [row for batch in data.batches for row in _beginnings(batch, task, length)]
        rows = rows[:: max(1, len(rows) // prompts)][:prompts]
        for start in range(0, len(rows), batch_size):
            ids_BN = torch.stack(rows[start : start + batch_size])
            task_B = torch.full((len(ids_BN),), task)
            found.append(TokenBatch(input_ids=ids_BN, attention_mask=None, task=task_B))
    return found


def _beginnings(batch: TokenBatch, task: int, length: int) -> Iterator[Int[Tensor, "N"]]:
    mask = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask
    for ids_N, mask_N, number in zip(batch.input_ids, mask, batch.task.tolist(), strict=True):
        if number == task and int(mask_N.sum()) > length:
            yield ids_N[mask_N][:length]


def generation_plan(model: StreamedModel, prompts: Sequence[TokenBatch], tokens: int) -> MemoryPlan:
    """Where the bytes of the last step go."""
    return model.memory_plan(
        [_longer(batch, batch.input_ids.new_zeros(len(batch.input_ids), tokens)) for batch in prompts]
    )


def continuations(
    model: StreamedModel, prompts: Sequence[TokenBatch], tokens: int, plan: MemoryPlan
) -> list[Int[Tensor, "B N"]]:
    """The most likely `tokens` tokens behind every prompt, one after the other.

    Raises:
        UserError: the memory budget is too small.
    """
    plan.check()
    batches = [model.on_device(batch) for batch in prompts]
    model.progress.start(f"generating with {model.checkpoint.path.name}", layers=model.num_layers, tokens=0)
    try:
        with torch.inference_mode():
            for _ in range(tokens):
                batches = [
                    _longer(batch, next_B[:, None])
                    for batch, next_B in zip(batches, _next(model, batches, plan), strict=True)
                ]
    finally:
        model.progress.stop()
        model.release()
    return [batch.input_ids[:, -tokens:].cpu() for batch in batches]


def _next(model: StreamedModel, batches: Sequence[TokenBatch], plan: MemoryPlan) -> list[Int[Tensor, "B"]]:
    """The most likely next token of every sequence."""
    hidden = model.activations(batches, plan)
    model.embed(batches, hidden)
    for layer in model.layers(resident=plan.resident, prefetch=plan.prefetch):
        model.progress.layer(layer.index)
        for number, batch in enumerate(batches):
            hidden[number] = model.run_layer(layer, batch, hidden[number])
    last = [hidden[number][:, -1].to(model.device) for number in range(len(batches))]
    return [
        row_logits(model, batch.input_ids[:, -1], rows_BD).argmax(1)
        for batch, rows_BD in zip(batches, last, strict=True)
    ]


def _longer(batch: TokenBatch, more_BN: Int[Tensor, "B N"]) -> TokenBatch:
    ids_BN = torch.cat([batch.input_ids, more_BN.to(batch.input_ids)], 1)
    return TokenBatch(input_ids=ids_BN, attention_mask=None, task=batch.task)


def generation_metrics(
    found: Sequence[Int[Tensor, "B N"]], reference: Sequence[Int[Tensor, "B N"]] | None, end_ids: Collection[int]
) -> GenerationMetrics:
    """What the continuations are like, beside those of the reference for the same prompts."""
    rows = [row for part in found for row in part.tolist()]
    tokens = len(rows[0])
    texts = [_until_end(row, end_ids) for row in rows]
    agreed = same = None
    if reference is not None:
        wanted = [_until_end(row, end_ids) for part in reference for row in part.tolist()]
        shares = [_common(text, other) / max(1, len(other)) for text, other in zip(texts, wanted, strict=True)]
        agreed = sum(shares) / len(rows)
        starts = [text[:START] == other[:START] for text, other in zip(texts, wanted, strict=True)]
        same = sum(starts) / len(rows)
    return GenerationMetrics(
        prompts=len(rows),
        tokens=tokens,
        ended=sum(len(text) < tokens for text in texts) / len(rows),
        looping=sum(len(text) == tokens and loops(text) for text in texts) / len(rows),
        distinct=sum(map(_distinct, texts)) / len(rows),
        agreed=agreed,
        same_start=same,
    )


def loops(ids: Sequence[int]) -> bool:
    """Whether the end repeats one run of tokens, three times at least."""
    tail = list(ids[-LOOP_TAIL:])
    periods = range(1, min(LOOP_PERIOD, len(tail) // 3) + 1)
    return any(tail[period:] == tail[:-period] for period in periods)


def _distinct(ids: Sequence[int]) -> float:
    grams = [tuple(ids[start : start + _GRAM]) for start in range(len(ids) - _GRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _until_end(ids: list[int], end_ids: Collection[int]) -> list[int]:
    ends = [place for place, token in enumerate(ids) if token in end_ids]
    return ids[: ends[0]] if ends else ids


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    differ = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def end_tokens(model: StreamedModel) -> frozenset[int]:
    """Ids of the tokens that end a text, from config.json."""
    found = model.stock.model.config.get_text_config().eos_token_id
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])
