"""Token batches: every verb's input, packed from documents or read from a file of ids.

Letters: B sequences of a batch, N positions of a sequence (padding included).
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moetools.errors import CheckpointError, DataError, UserError
from moetools.text.documents import Document
from moetools.text.sources import DataSource, iter_documents
from moetools.text.tokenizer_files import check_tokenizer_files, tokenizing

_LOG = logging.getLogger(__name__)
_PADDED_SHARE = 0.9
_CHUNK_DOCUMENTS = 64
_CHUNK_CHARACTERS = 1 << 18
_SHUFFLE_DOCUMENTS = 10_000
_BUCKET_SEQUENCES = 256
_VOCABULARY_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Sequences of one task.

    Attributes:
        input_ids: token ids, int64, padded on the right.
        attention_mask: true where a token is real; None when nothing is padded.
        task: index into `TokenData.tasks`, int64, the same for the whole batch.
    """

    input_ids: Int[Tensor, "B N"]
    attention_mask: Bool[Tensor, "B N"] | None
    task: Int[Tensor, "B"]

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """All batches of a run, task after task.

    Attributes:
        tasks: names, in the order of the sources.
        batches: each of a single task; the last of a task may be smaller.
        fingerprint: SHA-256 (hex) of task names, `seq_len` and every sequence's task and real tokens in order. It does
            not depend on the batch size or the padding.
        seq_len: longest sequence asked for.
    """

    tasks: tuple[str, ...]
    batches: tuple[TokenBatch, ...]
    fingerprint: str
    seq_len: int

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(batch.num_tokens for batch in self.batches)

    @property
    def num_sequences(self) -> int:
        """Sequences over all batches."""
        return sum(len(batch.input_ids) for batch in self.batches)

    def tokens_per_task(self) -> dict[str, int]:
        """Real tokens of each task, in task order."""
        counts = dict.fromkeys(self.tasks, 0)
        for batch in self.batches:
            counts[self.tasks[int(batch.task[0])]] += batch.num_tokens
        return counts


def load_tokenizer(path: Path, *, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder `path`; nothing is downloaded and no code from the folder is run.

    Raises:
        CheckpointError: no tokenizer there, a corrupt one, or one with ids of `vocab_size` or more.
    """
    if not path.is_dir():
        raise CheckpointError(f"no tokenizer: {path} is not a folder", hint="name its folder with --tokenizer PATH")
    check_tokenizer_files(path)
    try:
        with tokenizing(str(path)):
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            largest = _largest_id(tokenizer)
    except DataError as error:
        raise _unusable_tokenizer(path, error.__cause__ or error) from error
    if largest >= vocab_size:
        raise CheckpointError(
            f"wrong tokenizer: {path} has {len(tokenizer)} tokens with ids up to {largest}, "
            f"the model embeds {vocab_size} tokens (ids up to {vocab_size - 1})",
            hint="name the folder of the tokenizer this model was trained with: --tokenizer PATH",
        )
    if largest < _PADDED_SHARE * vocab_size:
        # Embeddings are padded by a few per cent at most; a much smaller tokenizer is probably another model's.
        _LOG.warning("%s has ids up to %d only, the model embeds %d tokens", path, largest, vocab_size)
    return tokenizer


def load_token_data(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seq_len: int = 512,
    samples: int | None = None,
    batch_size: int = 8,
    pack: bool = True,
    seed: int = 0,
    shuffle: bool = False,
    vocab_size: int | None = None,
) -> TokenData:
    """Batches of at most `batch_size` sequences of at most `seq_len` tokens, `samples` sequences per task (None: all).

    Packed, the documents of a task are joined, each behind one separator token (BOS, else EOS, else none), and cut into
    windows of exactly `seq_len`; the tail is dropped. Otherwise each document, separator in front, is a sequence of its
    own, cut at `seq_len`; those under 2 tokens are skipped, and runs of 256 are sorted by length so that little is
    padded. Reading stops with the last sequence needed. Rows of a .safetensors source are sequences as they are.

    `shuffle` draws documents through a buffer of 10,000, seeded by `seed` and the task's name. `vocab_size` bounds the
    ids of .safetensors sources; by default the tokenizer does. A task with fewer sequences than `samples` gives all.

    Raises:
        UserError: a size below its minimum, or text without a tokenizer.
        DataError: malformed data, or a task without a single sequence.
    """
    for name, value, least in (("seq-len", seq_len, 2), ("samples", samples, 1), ("batch-size", batch_size, 1)):
        if value is not None and value < least:
            raise UserError(f"--{name} {value} is too small; the least is {least}")
    tasks = tuple(source.task for source in sources)
    if vocab_size is None and tokenizer is not None:
        vocab_size = _largest_id(tokenizer) + 1
    batches: list[TokenBatch] = []
    for task, source in enumerate(sources):
        rng = random.Random(f"{seed}:{source.task}") if shuffle else None
        if source.is_tokens:
            sequences = _stored_sequences(source, vocab_size, seq_len, samples, rng)
        else:
            sequences = _text_sequences(source, tokenizer, seq_len, samples, rng, pack=pack)
        batches += _batches(sequences, task, batch_size, pad_id=padding_id(tokenizer))
    fingerprint = _fingerprint(tasks, batches, seq_len)
    return TokenData(tasks=tasks, batches=tuple(batches), fingerprint=fingerprint, seq_len=seq_len)


def separator_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The one token in front of a document: BOS, else EOS; empty when the tokenizer has neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    return []


def padding_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The id that fills padded positions: PAD, else EOS, else 0. Masked everywhere, so any legal id will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id) if tokenizer is not None else ()
    return next((token for token in candidates if token is not None), 0)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, no special tokens added, never truncated."""
    if not texts:
        return []
    # verbose=False: a text longer than the model's context is no fault here, it will be cut.
    with tokenizing(str(tokenizer.name_or_path)):
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return encoded["input_ids"]


def pad_right(sequences: Sequence[Tensor], pad_id: int) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"] | None]:
    """Sequences (each [n], int64) as one batch and its mask, which is None when all are equally long."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=pad_id)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids, None if bool(mask.all()) else mask


def _text_sequences(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase | None,
    seq_len: int,
    samples: int | None,
    rng: random.Random | None,
    *,
    pack: bool,
) -> list[Tensor]:
    if tokenizer is None:
        raise UserError(f"task '{source.task}' is text, and there is no tokenizer", hint="name one: --tokenizer PATH")
    with closing(iter_documents(source)) as documents:
        encoded = _encoded(documents if rng is None else _shuffled(documents, rng), tokenizer)
        return (_packed if pack else _unpacked)(encoded, source, seq_len, samples)


def _packed(encoded: Iterator[list[int]], source: DataSource, seq_len: int, samples: int | None) -> list[Tensor]:
    windows: list[Tensor] = []
    rest: list[int] = []
    for ids in encoded:
        rest += ids
        full = len(rest) // seq_len * seq_len
        if full:
            windows += torch.tensor(rest[:full]).view(-1, seq_len)
            rest = rest[full:]
        if samples is not None and len(windows) >= samples:
            break
    if not windows:
        shorter = f"--seq-len {len(rest)} at most, " if len(rest) >= 2 else ""
        raise DataError(
            f"task '{source.task}' ({source.location}) has {len(rest)} tokens, fewer than one sequence of {seq_len}",
            hint=f"use {shorter}--no-pack, or more text",
        )
    return windows[:samples]


def _unpacked(encoded: Iterator[list[int]], source: DataSource, seq_len: int, samples: int | None) -> list[Tensor]:
    sequences = (torch.tensor(ids[:seq_len]) for ids in encoded if len(ids) >= 2)
    kept = list(islice(sequences, samples))
    if not kept:
        raise DataError(
            f"task '{source.task}' ({source.location}) has no document of 2 tokens or more", hint="use more text"
        )
    return [
        sequence
        for start in range(0, len(kept), _BUCKET_SEQUENCES)
        for sequence in sorted(kept[start : start + _BUCKET_SEQUENCES], key=len)
    ]


def _encoded(documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Ids of each document behind its separator, tokenized in chunks because the tokenizer is parallel inside."""
    separator = separator_ids(tokenizer)
    for chunk in _chunks(documents):
        texts = [_text(document, tokenizer) for document in chunk]
        for document, ids in zip(chunk, encode(tokenizer, texts), strict=True):
            # Chat templates usually write the BOS token themselves.
            begun = document.messages is not None and ids[:1] == separator
            yield ids if begun else separator + ids


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text or "")
        if len(chunk) == _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _text(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    if document.text is not None:
        return document.text
    if not tokenizer.chat_template:
        raise DataError(
            f"{document.where}: 'messages' need a chat template, and the tokenizer has none",
            hint="use text records, or --tokenizer PATH with a tokenizer that has a chat template",
        )
    try:
        return tokenizer.apply_chat_template(document.messages, tokenize=False)
    except Exception as error:
        raise DataError(
            f"{document.where}: the chat template refuses these messages: {str(error) or type(error).__name__}",
            hint="check the roles and their order",
        ) from error


def _shuffled(documents: Iterator[Document], rng: random.Random) -> Iterator[Document]:
    """Documents in random order, exactly uniform up to 10,000; of more, each is drawn from a buffer of that many."""
    buffer = list(islice(documents, _SHUFFLE_DOCUMENTS))
    for document in documents:
        at = rng.randrange(len(buffer))
        yield buffer[at]
        buffer[at] = document
    rng.shuffle(buffer)
    yield from buffer


def _stored_sequences(
    source: DataSource, vocab_size: int | None, seq_len: int, samples: int | None, rng: random.Random | None
) -> list[Tensor]:
    """Rows of `input_ids` [N, S], without what an `attention_mask` of the same shape masks."""
    ids, mask = _read_ids(source.files()[0])
    if ids.shape[1] > seq_len:
        raise DataError(
            f"{source.location}: its sequences have {ids.shape[1]} tokens, more than --seq-len {seq_len}",
            hint=f"use --seq-len {ids.shape[1]}",
        )
    rows = list(range(len(ids)))
    if rng is not None:
        rng.shuffle(rows)
    sequences = [ids[row] if mask is None else ids[row][mask[row]] for row in rows]
    sequences = [sequence for sequence in sequences if len(sequence) >= 2][:samples]
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
        with safe_open(path, "pt") as file:
            names = sorted(file.keys())
            tensors = {name: file.get_tensor(name) for name in ("input_ids", "attention_mask") if name in names}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read as safetensors: {error}", hint="write the file again") from error
    ids, mask = tensors.get("input_ids"), tensors.get("attention_mask")
    if ids is None:
        raise DataError(
            f"{path} has no tensor 'input_ids'; it has: {', '.join(names[:5]) or '(none)'}",
            hint="--data takes token ids [sequences, length]; is this a model's file?",
        )
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        received = f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
        raise DataError(f"{path}: 'input_ids' is {received}, not integers [sequences, length]", hint="write it again")
    if mask is not None and mask.shape != ids.shape:
        raise DataError(
            f"{path}: 'attention_mask' is {list(mask.shape)}, 'input_ids' {list(ids.shape)}", hint="write it again"
        )
    return ids.long(), None if mask is None else mask.bool()


def _batches(sequences: list[Tensor], task: int, batch_size: int, *, pad_id: int) -> Iterator[TokenBatch]:
    for start in range(0, len(sequences), batch_size):
        ids, mask = pad_right(sequences[start : start + batch_size], pad_id)
        yield TokenBatch(input_ids=ids, attention_mask=mask, task=torch.full((len(ids),), task))


def _fingerprint(tasks: tuple[str, ...], batches: Sequence[TokenBatch], seq_len: int) -> str:
    digest = hashlib.sha256(json.dumps([tasks, seq_len]).encode())
    for batch in batches:
        for row, ids in enumerate(batch.input_ids):
            real = ids if batch.attention_mask is None else ids[batch.attention_mask[row]]
            digest.update(f"{int(batch.task[row])}:{len(real)};".encode())
            digest.update(real.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values())


def _unusable_tokenizer(path: Path, error: BaseException) -> CheckpointError:
    hint = "name a folder with a tokenizer.json: --tokenizer PATH (code inside a checkpoint is never run)"
    if not any(next(path.glob(pattern), None) for pattern in _VOCABULARY_FILES):
        return CheckpointError(f"{path} has no tokenizer", hint=hint)
    detail = (str(error).splitlines() or [""])[0]
    return CheckpointError(f"the tokenizer in {path} cannot be loaded: {type(error).__name__}: {detail}", hint=hint)
