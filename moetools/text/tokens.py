"""Token batches: every verb's input, packed from documents or read from a file of ids.

Letters: B sequences of a batch, N positions of a sequence (padding included).
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moetools.text.budget import Samples, check_sizes, default_sequences, take
from moetools.text.sequences import BETWEEN, Cut, TaskText, check_distinct, sequences_of, sort_by_length
from moetools.text.sources import DataSource, Skipped
from moetools.text.tokenizer import largest_id, padding_id

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Sequences of one task.

    Attributes:
        input_ids: token ids, int64, padded on the right.
        attention_mask: true where a token is real; None when nothing is padded.
        task: index into `TokenData.tasks`, int64, the same for the whole batch.
        source: columns that an encoder reads; the others are a decoder's, its start token first, padded on the right
            too. None for a decoder alone.
    """

    input_ids: Int[Tensor, "B N"]
    attention_mask: Bool[Tensor, "B N"] | None
    task: Int[Tensor, "B"]
    source: int | None = None

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())


@dataclass(frozen=True, kw_only=True)
class DocumentCount:
    """Where a task's sequences come from.

    Attributes:
        documents: how many they were cut from; None for ids that were stored as sequences.
        skipped: records that could not be used.
        reason: what was wrong with the first of those.
    """

    documents: int | None = None
    skipped: int = 0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class TaskMix:
    """One row of the mix of a run's text: a task, where it comes from and how much it is."""

    task: str
    read: DocumentCount
    sequences: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """All batches of a run, task after task.

    Attributes:
        tasks: names, in the order of the sources.
        batches: each of a single task; the last of a task may be smaller.
        fingerprint: SHA-256 (hex) of task names, `seq_len` and every sequence's task and real tokens in order. It does
            not depend on the batch size or the padding.
        seq_len: longest sequence asked for.
        read: of each task, where it comes from; empty where that is not known.
    """

    tasks: tuple[str, ...]
    batches: tuple[TokenBatch, ...]
    fingerprint: str
    seq_len: int
    read: tuple[DocumentCount, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(batch.num_tokens for batch in self.batches)

    @property
    def num_sequences(self) -> int:
        """Sequences over all batches."""
        return sum(len(batch.input_ids) for batch in self.batches)

    @property
    def mix(self) -> tuple[TaskMix, ...]:
        """What the run's text consists of, a row per task."""
        sequences = [0] * len(self.tasks)
        for batch in self.batches:
            sequences[int(batch.task[0])] += len(batch.input_ids)
        rows = zip(self.tasks, self.read or [DocumentCount()] * len(self.tasks), sequences, strict=True)
        tokens = self.tokens_per_task()
        return tuple(TaskMix(task=task, read=read, sequences=count, tokens=tokens[task]) for task, read, count in rows)

    def tokens_per_task(self) -> dict[str, int]:
        """Real tokens of each task, in task order."""
        counts = dict.fromkeys(self.tasks, 0)
        for batch in self.batches:
            counts[self.tasks[int(batch.task[0])]] += batch.num_tokens
        return counts


def load_token_data(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seq_len: int = 512,
    samples: Samples = "all",
    batch_size: int = 8,
    pack: bool = True,
    seed: int = 0,
    shuffle: bool = False,
    vocab_size: int | None = None,
    column: str | None = None,
    strict: bool = False,
    decoder_start: int | None = None,
) -> TokenData:
    """Batches of at most `batch_size` sequences of at most `seq_len` tokens.

    `samples` is the number of sequences per task, "all", or None for 512 sequences of 512 tokens over all tasks
    together (`budget.take`). A task with fewer gives all it has, which is logged.

    Packed, the documents of a task are joined, each behind one separator token (BOS, else EOS, else none), and cut into
    windows of exactly `seq_len`; the tail is dropped. Otherwise each document, separator in front, is a sequence of its
    own, cut at `seq_len`; those under 2 tokens are skipped, and runs of 256 are sorted by length so that little is
    padded. Reading stops with the last sequence needed. Rows of a .safetensors source are sequences as they are.

    Records that cannot be used are skipped, which is logged with their number and the first reason; `strict` refuses
    the first. `column` names the key that holds the text. `shuffle` draws documents through a buffer of 10,000, seeded
    by `seed` and the task's name. `vocab_size` bounds the ids of .safetensors sources; by default the tokenizer does.

    With `decoder_start`, the id that an encoder-decoder model's decoder starts with, each record is a prompt with its
    completion: EOS goes behind both, each is cut at `seq_len` tokens, and nothing is packed.

    Raises:
        UserError: a size below its minimum, or text without a tokenizer.
        DataError: data that cannot be read, a task without a single usable record or sequence, or one that the
            tokenizer makes into repetitions of a single token.
    """
    check_sizes(seq_len, samples, batch_size)
    if vocab_size is None and tokenizer is not None:
        vocab_size = largest_id(tokenizer) + 1
    orders = [f"{seed}:{source.task}" if shuffle else None for source in sources]
    texts = [
        TaskText(source=source, order=order, column=column, skipped=Skipped(strict=strict))
        for source, order in zip(sources, orders, strict=True)
    ]
    pairs = decoder_start is not None
    cut = Cut(seq_len=seq_len, pack=pack and not pairs, vocab_size=vocab_size, pairs=pairs)
    taken = _taken(texts, tokenizer, cut, samples)
    batches: list[TokenBatch] = []
    for task, sequences in enumerate(taken):
        batches += _batches(sequences, task, batch_size, pad_id=padding_id(tokenizer), start_id=decoder_start)
    tasks = tuple(source.task for source in sources)
    data = TokenData(
        tasks=tasks,
        batches=tuple(batches),
        fingerprint=_fingerprint(tasks, batches, seq_len),
        seq_len=seq_len,
        read=tuple(_count(text) for text in texts),
    )
    _log_mix(data.mix, seq_len, samples)
    return data


def pad_right(sequences: Sequence[Tensor], pad_id: int) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"] | None]:
    """Sequences (each [n], int64) as one batch and its mask, which is None when all are equally long."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=pad_id)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids, None if bool(mask.all()) else mask


def _taken(
    texts: Sequence[TaskText], tokenizer: PreTrainedTokenizerBase | None, cut: Cut, samples: Samples
) -> list[list[Tensor]]:
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(sequences_of(text, tokenizer, cut))) for text in texts]
        taken = take(streams, samples, cut.seq_len)
    _log_shortfalls(texts, taken, samples)
    if tokenizer is None:
        return taken
    return [_checked(text, sequences, tokenizer, cut.pack) for text, sequences in zip(texts, taken, strict=True)]


def _checked(text: TaskText, sequences: list[Tensor], tokenizer: PreTrainedTokenizerBase, pack: bool) -> list[Tensor]:
    if text.source.is_tokens:
        return sequences
    check_distinct(sequences, tokenizer, text.source)
    return sequences if pack else sort_by_length(sequences)


def _count(text: TaskText) -> DocumentCount:
    first = text.skipped.first
    return DocumentCount(
        documents=text.documents, skipped=text.skipped.count, reason=first.message if first is not None else ""
    )


def _log_shortfalls(texts: Sequence[TaskText], taken: Sequence[list[Tensor]], samples: Samples) -> None:
    for text, sequences in zip(texts, taken, strict=True):
        task, found = text.source.task, len(sequences)
        if text.skipped.first is not None:
            reason = text.skipped.first.message
            _LOG.warning("task '%s': records skipped: %d; the first: %s", task, text.skipped.count, reason)
        if isinstance(samples, int) and found < samples:
            _LOG.warning("task '%s' has %d sequences of the %d asked for", task, found, samples)


def _log_mix(mix: Sequence[TaskMix], seq_len: int, samples: Samples) -> None:
    counts = ", ".join(f"{one.task} {one.sequences:,} sequences ({one.tokens:,} tokens)" for one in mix)
    which = ""
    if samples is None and mix:
        less = sum(one.sequences for one in mix) < default_sequences(seq_len, len(mix))
        which = "; all there is" if less else "; `samples=all` takes everything"
    _LOG.info("text: %s%s", counts, which)


def _batches(
    sequences: list[Tensor], task: int, batch_size: int, *, pad_id: int, start_id: int | None
) -> Iterator[TokenBatch]:
    for start in range(0, len(sequences), batch_size):
        some = sequences[start : start + batch_size]
        task_B = torch.full((len(some),), task)
        if start_id is not None:
            yield _pair_batch(some, task_B, pad_id, start_id)
            continue
        ids, mask = pad_right(some, pad_id)
        yield TokenBatch(input_ids=ids, attention_mask=mask, task=task_B)


def _pair_batch(pairs: Sequence[Tensor], task_B: Tensor, pad_id: int, start_id: int) -> TokenBatch:
    """Prompts side by side with their completions, each padded on its own."""
    places = [int((pair == BETWEEN).nonzero()[0]) for pair in pairs]
    prompts, prompt_mask = pad_right([pair[:at] for pair, at in zip(pairs, places, strict=True)], pad_id)
    behind = [pair[at:].where(pair[at:] != BETWEEN, start_id) for pair, at in zip(pairs, places, strict=True)]
    completions, mask = pad_right(behind, pad_id)
    masks = None
    if prompt_mask is not None or mask is not None:
        whole = [torch.ones_like(ids, dtype=torch.bool) for ids in (prompts, completions)]
        masks = torch.cat([whole[0] if prompt_mask is None else prompt_mask, whole[1] if mask is None else mask], 1)
    ids = torch.cat([prompts, completions], 1)
    return TokenBatch(input_ids=ids, attention_mask=masks, task=task_B, source=prompts.shape[1])


def _fingerprint(tasks: tuple[str, ...], batches: Sequence[TokenBatch], seq_len: int) -> str:
    digest = hashlib.sha256(json.dumps([tasks, seq_len]).encode())
    for batch in batches:
        for row, ids in enumerate(batch.input_ids):
            real = ids if batch.attention_mask is None else ids[batch.attention_mask[row]]
            digest.update(f"{int(batch.task[row])}:{len(real)};".encode())
            digest.update(real.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
