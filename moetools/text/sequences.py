"""One task's sequences, as a stream: text is read, tokenized and cut only as far as sequences are drawn.

A document longer than 65,536 characters is tokenized in pieces of about that size, cut behind a line's end where there
is one in the piece's second half, else before a space. Tokenizers that look no further than a word or a line give the
same ids as for the whole; one that puts a space in front of every text (sentencepiece) has one more token per piece.

Letters: N positions of a sequence.
"""

import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moetools.checkpoint.tensor_file import open_tensor_file
from moetools.errors import CheckpointError, DataError, UserError
from moetools.text.chat import Passage, passage
from moetools.text.records import SHAPE_HINT, Document
from moetools.text.sources import DataSource, Skipped, iter_documents, usable
from moetools.text.tokenizer import encode, separator_ids

BETWEEN = -1
"""Stands between the ids of a prompt and those of its completion, where a decoder starts."""
_CHUNK_DOCUMENTS = 64
_CHUNK_CHARACTERS = 1 << 18
_PIECE_CHARACTERS = 1 << 16
_SHUFFLE_DOCUMENTS = 10_000
_BUCKET_SEQUENCES = 256
_ENOUGH_TO_JUDGE = 32


@dataclass(kw_only=True)
class TaskText:
    """One task on its way to sequences.

    Attributes:
        source: where its text is.
        order: seed of the random order in which documents are drawn; None takes them as they come.
        column: key that holds the text.
        skipped: records that could not be used so far.
        documents: documents that the sequences drawn so far were cut from; None for stored ids.
    """

    source: DataSource
    order: str | None = None
    column: str | None = None
    skipped: Skipped
    documents: int | None = None


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How text becomes sequences: `load_token_data` says what the values mean."""

    seq_len: int
    pack: bool
    vocab_size: int | None
    pairs: bool = False


def sequences_of(
    text: TaskText,
    tokenizer: PreTrainedTokenizerBase | None,
    cut: Cut,
) -> Generator[Tensor, None, None]:
    """The task's sequences (each [n], int64), see `load_token_data`; `text` counts along.

    Raises:
        UserError: text without a tokenizer.
        DataError: data that cannot be read, or, at its end, not a single sequence.
    """
    if cut.pairs and text.source.is_tokens:
        raise DataError(
            f"task '{text.source.task}' ({text.source.location}) holds token ids, and an encoder-decoder model reads "
            "prompts with completions",
            hint=SHAPE_HINT,
        )
    if text.source.is_tokens:
        yield from _stored_sequences(text, cut.vocab_size, cut.seq_len)
        return
    if tokenizer is None:
        raise UserError(
            f"task '{text.source.task}' is text, and there is no tokenizer", hint="name one: `tokenizer=PATH`"
        )
    text.documents = 0
    with closing(iter_documents(text.source, column=text.column, skipped=text.skipped)) as documents:
        ordered = documents if text.order is None else _shuffled(documents, random.Random(text.order))
        if cut.pairs:
            yield from _pairs(ordered, tokenizer, text, cut.seq_len)
            return
        passages = usable((passage(one, tokenizer) for one in ordered), text.source.location, text.skipped)
        yield from (_packed if cut.pack else _unpacked)(_encoded(passages, tokenizer), text, cut.seq_len)


def sort_by_length(sequences: Sequence[Tensor]) -> list[Tensor]:
    """The same in runs of 256 that are sorted, so that a batch is padded little."""
    return [
        sequence
        for start in range(0, len(sequences), _BUCKET_SEQUENCES)
        for sequence in sorted(sequences[start : start + _BUCKET_SEQUENCES], key=len)
    ]


def check_distinct(sequences: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase, source: DataSource) -> None:
    """Refuse text of which nothing is left but separators, or repetitions of a single token.

    Raises:
        DataError: naming the token.
    """
    ids = torch.cat(list(sequences))
    ids = ids[~torch.isin(ids, torch.tensor(separator_ids(tokenizer), dtype=torch.int64))]
    if not len(ids):
        raise DataError(
            f"task '{source.task}' ({source.location}) has nothing but empty documents", hint="use another text or key"
        )
    if len(ids) >= _ENOUGH_TO_JUDGE and bool((ids == ids[0]).all()):
        raise DataError(
            f"the tokenizer makes all text of task '{source.task}' into one token, id {int(ids[0])}",
            hint="it is not the one this model was trained with; name that one's folder: `tokenizer=PATH`",
        )


def _packed(documents: Iterator[Iterator[list[int]]], text: TaskText, seq_len: int) -> Iterator[Tensor]:
    rest: list[int] = []
    found = False
    for document in documents:
        text.documents = (text.documents or 0) + 1
        for ids in document:
            rest += ids
            full = len(rest) // seq_len * seq_len
            if full:
                found = True
                yield from torch.tensor(rest[:full]).view(-1, seq_len)
                rest = rest[full:]
    if not found:
        shorter = f"`seq_len={len(rest)}` at most, " if len(rest) >= 2 else ""
        raise DataError(
            f"task '{text.source.task}' ({text.source.location}) has {len(rest)} tokens, "
            f"fewer than one sequence of {seq_len}",
            hint=f"use {shorter}`pack=False`, or more text",
        )


def _unpacked(documents: Iterator[Iterator[list[int]]], text: TaskText, seq_len: int) -> Iterator[Tensor]:
    for document in documents:
        ids: list[int] = []
        for piece in document:
            ids += piece
            if len(ids) >= seq_len:
                break
        if len(ids) >= 2:
            text.documents = (text.documents or 0) + 1
            yield torch.tensor(ids[:seq_len])
    if not text.documents:
        raise DataError(
            f"task '{text.source.task}' ({text.source.location}) has no document of 2 tokens or more",
            hint="use more text",
        )


def _pairs(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase, text: TaskText, seq_len: int
) -> Iterator[Tensor]:
    """Ids of each prompt, `BETWEEN`, and ids of its completion; EOS behind both, as encoder-decoders are trained."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        if document.prompt is None or document.text is None:
            raise DataError(
                f"{document.where}: an encoder-decoder model reads 'prompt' with 'completion', both strings",
                hint='write {"prompt": "...", "completion": "..."}',
            )
        sides = encode(tokenizer, [document.prompt, document.text[len(document.prompt) :]])
        prompt, completion = ([*ids[: seq_len - len(end)], *end] for ids in sides)
        if prompt and completion:
            text.documents = (text.documents or 0) + 1
            yield torch.tensor([*prompt, BETWEEN, *completion])
    if not text.documents:
        raise DataError(f"task '{text.source.task}' ({text.source.location}) has no record", hint="use more text")


def _encoded(passages: Iterator[Passage], tokenizer: PreTrainedTokenizerBase) -> Iterator[Iterator[list[int]]]:
    """Ids of each document behind its separator, a long document's piece by piece as they are drawn.

    First pieces are tokenized in chunks because the tokenizer is parallel inside.
    """
    separator = separator_ids(tokenizer)
    for chunk in _chunks(passages):
        heads = [one.text[: _cut(one.text, 0)] for one in chunk]
        for one, head, ids in zip(chunk, heads, encode(tokenizer, heads), strict=True):
            # Chat templates usually write the BOS token themselves.
            begun = one.is_chat and ids[:1] == separator
            yield chain([ids if begun else separator + ids], _pieces(one.text, len(head), tokenizer))


def _chunks(passages: Iterator[Passage]) -> Iterator[list[Passage]]:
    chunk: list[Passage] = []
    characters = 0
    for one in passages:
        chunk.append(one)
        characters += len(one.text)
        if len(chunk) == _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _pieces(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    while start < len(text):
        end = _cut(text, start)
        yield from encode(tokenizer, [text[start:end]])
        start = end


def _cut(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends."""
    end = start + _PIECE_CHARACTERS
    if end >= len(text):
        return len(text)
    middle = start + _PIECE_CHARACTERS // 2
    if (line := text.rfind("\n", middle, end)) >= 0:
        return line + 1
    space = text.rfind(" ", middle, end)
    return space if space >= 0 else end


def _shuffled(documents: Iterator[Document], rng: random.Random) -> Iterator[Document]:
    """Documents in random order, exactly uniform up to 10,000; of more, each is drawn from a buffer of that many."""
    buffer = list(islice(documents, _SHUFFLE_DOCUMENTS))
    for document in documents:
        at = rng.randrange(len(buffer))
        yield buffer[at]
        buffer[at] = document
    rng.shuffle(buffer)
    yield from buffer


def _stored_sequences(text: TaskText, vocab_size: int | None, seq_len: int) -> list[Tensor]:
    """Rows of `input_ids` [N, S], without what an `attention_mask` of the same shape masks."""
    source = text.source
    ids, mask = _read_ids(source.files()[0])
    if ids.shape[1] > seq_len:
        raise DataError(
            f"{source.location}: its sequences have {ids.shape[1]} tokens, more than `seq_len={seq_len}`",
            hint=f"use `seq_len={ids.shape[1]}`",
        )
    rows = list(range(len(ids)))
    if text.order is not None:
        random.Random(text.order).shuffle(rows)
    sequences = [ids[row] if mask is None else ids[row][mask[row]] for row in rows]
    sequences = [sequence for sequence in sequences if len(sequence) >= 2]
    if not sequences:
        raise DataError(f"{source.location} has no sequence of 2 tokens or more", hint="write the file again")
    low, high = min(int(s.min()) for s in sequences), max(int(s.max()) for s in sequences)
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise DataError(
            f"{source.location}: token ids from {low} to {high}; legal are 0 to {(vocab_size or high + 1) - 1}",
            hint="the ids were made with another tokenizer; use the text instead",
        )
    return sequences


def _read_ids(path: Path) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"] | None]:
    try:
        file = open_tensor_file(path)
        names = sorted(file.tensors)
        tensors = file.read(name for name in ("input_ids", "attention_mask") if name in names)
    except CheckpointError as error:
        raise DataError(
            f"{path} cannot be read as safetensors: {error.message}", hint="write the file again"
        ) from error
    ids, mask = tensors.get("input_ids"), tensors.get("attention_mask")
    if ids is None:
        raise DataError(
            f"{path} has no tensor 'input_ids'; it has: {', '.join(names[:5]) or '(none)'}",
            hint="`data` takes token ids [sequences, length]; is this a model's file?",
        )
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        received = f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
        raise DataError(f"{path}: 'input_ids' is {received}, not integers [sequences, length]", hint="write it again")
    if mask is not None and mask.shape != ids.shape:
        raise DataError(
            f"{path}: 'attention_mask' is {list(mask.shape)}, 'input_ids' {list(ids.shape)}", hint="write it again"
        )
    return ids.long(), None if mask is None else mask.bool()
