"""What a model writes on its own: continuations, greedy or drawn, and what goes wrong in them.

Likelihood does not show a model that repeats itself for ever (Holtzman et al. 2020, "The Curious Case of Neural Text
Degeneration"). A model that fits in memory is continued by transformers' own `generate`, with a cache of keys and
values. Others run layer by layer, all tokens again for every new one.
"""

import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from moetools.forward.head import row_logits
from moetools.forward.memory import MemoryPlan
from moetools.forward.streaming import StreamedModel
from moetools.text.tokens import TokenBatch, TokenData

LOOP_TAIL, LOOP_PERIOD = 24, 8
"""A continuation loops if its last 24 tokens, or all of fewer, repeat with a period of at most 8 and of a third."""
START = 16
"""Tokens that must be the reference's for the same start."""
_GRAM = 4
_SURROGATES, _GAP = 0xD800, 0x800

Continuations = list[Int[Tensor, "B N"]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn: from softmax(logits / temperature), cut to the likeliest with `top_p` of it together."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class GenerationMetrics:
    """Continuations of one model.

    Attributes:
        prompts: their number.
        tokens: of each continuation at most; one ends before at a token that ends a text.
        ended: share that ended.
        length: mean of their tokens before the end.
        looping: share that did not end and loops.
        distinct: share of runs of 4 tokens that are not the same as another of their continuation; mean over prompts.
        compression: size of the token ids (as UTF-8) by their size in zlib; mean over prompts. About 1 where nothing
            repeats.
        agreed: share of the reference's continuation before the first other token; mean over prompts. None without a
            reference.
        same_start: share of prompts whose first 16 tokens are the reference's.
    """

    prompts: int
    tokens: int
    ended: float
    length: float
    looping: float
    distinct: float
    compression: float
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
    """Where the bytes of the last step go; `scratch` is the cache of keys and values, 0 where there is none."""
    longest = [_longer(batch, batch.input_ids.new_zeros(len(batch.input_ids), tokens)) for batch in prompts]
    plan = model.memory_plan(longest)
    largest = max(batch.input_ids.numel() for batch in longest)
    cached = replace(plan, scratch=_cache_bytes(model, largest))
    return cached if cached.resident and _generates(model) else plan


def _generates(model: StreamedModel) -> bool:
    """Whether transformers' `generate` runs the model as it is here: nothing left empty, no foreign code."""
    stock = model.stock
    own = type(stock.model).__module__.startswith("transformers.")
    return own and stock.model.can_generate() and not (model.own_entry or stock.flow.idle or stock.flow.problem)


def _cache_bytes(model: StreamedModel, tokens: int) -> int:
    """Of keys and values of every head; transformers keeps no latent ones, and copies a layer's when it grows."""
    config = model.stock.model.config.get_text_config()
    query_heads: int = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or query_heads
    rotated = (getattr(config, f"qk_{part}_head_dim", None) or 0 for part in ("nope", "rope"))
    width = max(getattr(config, "head_dim", None) or model.hidden_size // query_heads, sum(rotated))
    return 2 * heads * width * tokens * (model.num_layers + 1) * model.dtype.itemsize


class _Draw:
    """Makes the highest score that of the next token: greedily as they are, sampling with noise (Gumbel-max).

    Every sequence has noise of its own, of the seed and its number: a draw does not depend on batches, and two models
    that are compared draw alike where they think alike.
    """

    def __init__(self, sampling: Sampling | None, rows: range) -> None:
        self._warpers: list[TemperatureLogitsWarper | TopPLogitsWarper] = []
        self._noise: list[numpy.random.Generator] = []
        if sampling is None:
            return
        self._warpers = [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)]
        self._noise = [numpy.random.Generator(numpy.random.Philox(key=[sampling.seed, row])) for row in rows]

    def __call__(self, input_ids: Int[Tensor, "B N"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        if not self._noise:
            return scores
        scores = scores.float()
        for warp in self._warpers:
            scores = warp(input_ids, scores)
        noise = numpy.stack([one.gumbel(size=scores.shape[1]) for one in self._noise])
        return scores + torch.from_numpy(noise).to(scores)


def continuations(
    model: StreamedModel,
    prompts: Sequence[TokenBatch],
    tokens: int,
    plan: MemoryPlan,
    *,
    end_ids: Collection[int] = (),
    sampling: Sampling | None = None,
) -> Continuations:
    """`tokens` tokens behind every prompt, the most likely ones or drawn, one after the other.

    Args:
        plan: of `generation_plan`.
        end_ids: what follows one of them means nothing.

    Raises:
        UserError: the memory budget is too small.
    """
    plan.check()
    batches = [model.on_device(batch) for batch in prompts]
    draws, first = [], 0
    for batch in batches:
        draws.append(_Draw(sampling, range(first, first + len(batch.input_ids))))
        first += len(batch.input_ids)
    model.progress.start(f"generating with {model.checkpoint.path.name}", layers=model.num_layers, tokens=0)
    try:
        with torch.inference_mode():
            write = _with_cache if plan.scratch else _layer_by_layer
            return write(model, batches, tokens, plan, end_ids, draws)
    finally:
        model.progress.stop()
        model.release()


def _with_cache(
    model: StreamedModel,
    batches: Sequence[TokenBatch],
    tokens: int,
    plan: MemoryPlan,
    end_ids: Collection[int],
    draws: Sequence[_Draw],
) -> Continuations:
    _ = model.skeleton
    for layer in model.layers(resident=True, prefetch=plan.prefetch):
        model.progress.layer(layer.index)
    pad = min(end_ids, default=0)
    stock = model.stock.model
    # `generate` fills what a config leaves open from the model's own.
    stock.generation_config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, use_cache=True, eos_token_id=sorted(end_ids) or None, pad_token_id=pad
    )
    found = []
    for batch, draw in zip(batches, draws, strict=True):
        ids_BN = stock.generate(
            input_ids=batch.input_ids,
            attention_mask=torch.ones_like(batch.input_ids),
            logits_processor=LogitsProcessorList([draw]),
        )
        more_BN = ids_BN[:, batch.input_ids.shape[1] :].cpu()
        found.append(torch.nn.functional.pad(more_BN, (0, tokens - more_BN.shape[1]), value=pad))
    return found


def _layer_by_layer(
    model: StreamedModel,
    batches: Sequence[TokenBatch],
    tokens: int,
    plan: MemoryPlan,
    _end_ids: Collection[int],
    draws: Sequence[_Draw],
) -> Continuations:
    for _ in range(tokens):
        scores = _next_logits(model, batches, plan)
        batches = [
            _longer(batch, draw(batch.input_ids, scores_BV).argmax(1)[:, None])
            for batch, draw, scores_BV in zip(batches, draws, scores, strict=True)
        ]
    return [batch.input_ids[:, -tokens:].cpu() for batch in batches]


def _next_logits(model: StreamedModel, batches: Sequence[TokenBatch], plan: MemoryPlan) -> list[Float[Tensor, "B V"]]:
    """Logits of the next token of every sequence."""
    hidden = model.activations(batches, plan)
    model.embed(batches, hidden)
    for layer in model.layers(resident=plan.resident, prefetch=plan.prefetch):
        model.progress.layer(layer.index)
        for number, batch in enumerate(batches):
            hidden[number] = model.run_layer(layer, batch, hidden[number])
    last = [hidden[number][:, -1].to(model.device) for number in range(len(batches))]
    return [row_logits(model, batch.input_ids[:, -1], rows_BD) for batch, rows_BD in zip(batches, last, strict=True)]


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
        length=sum(map(len, texts)) / len(rows),
        distinct=sum(map(_distinct, texts)) / len(rows),
        compression=sum(map(_compression, texts)) / len(rows),
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


def _compression(ids: Sequence[int]) -> float:
    raw = "".join(chr(token if token < _SURROGATES else token + _GAP) for token in ids).encode()
    return len(raw) / len(zlib.compress(raw, 9)) if raw else 1.0


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
