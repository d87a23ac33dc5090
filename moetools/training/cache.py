"""The teacher's most likely tokens at every position, on disk: captured once by the streaming core, trained on later.

The teacher never has to fit beside the student, nor at all: its layers are streamed, one group of sequences at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.tensor_bytes import tensor_bytes
from moetools.checkpoint.tensor_file import TensorFile, open_tensor_file
from moetools.errors import CheckpointError, StatisticsError, UserError
from moetools.forward.head import head_rows, row_logits
from moetools.forward.memory import MemoryPlan
from moetools.forward.progress import announced
from moetools.forward.streaming import StreamedModel
from moetools.sizes import format_bytes
from moetools.text.tokens import TokenBatch, TokenData, pad_right
from moetools.training.data import Sequences
from moetools.training.loss import TopTargets

_LOG = logging.getLogger(__name__)
_FORMAT = "moetools-teacher-cache-2"
_NAMES = ("index", "log_prob", "log_tail")
_DIGEST = "sha256"
_RUN_AGAIN = "run again: a damaged group is captured anew"
_PART_TOKENS = 1 << 18
_SMALL_VOCABULARY = 1 << 15


@dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """What a cache was captured from; all of it must match before it is used.

    Attributes:
        teacher: fingerprint of the checkpoint.
        tokenizer: SHA-256 of its tokenizer.json; empty without one.
        data: fingerprint of the sequences.
        top: tokens kept per position.
        vocabulary: tokens the teacher predicts.
        dtype: compute dtype of the capture.
    """

    teacher: str
    tokenizer: str
    data: str
    top: int
    vocabulary: int
    dtype: str


class TeacherCache:
    """A folder with one file per group of sequences, and what they were captured from.

    Per predicted position: `top` token ids (int16 or int32), their log-probabilities and the log of the tail's mass
    (fp16 and fp32). Files appear whole and hold a digest of their tensors; an interrupted capture goes on with the next
    group, and a damaged group is captured again.

    Args:
        folder: of the cache; made if it is not there.
    """

    def __init__(
        self, folder: Path, teacher: StreamedModel, sequences: Sequences, data: TokenData, *, top: int
    ) -> None:
        self.folder, self._teacher, self._sequences = Path(folder), teacher, sequences
        tokenizer = teacher.checkpoint.path / "tokenizer.json"
        self.identity = CacheIdentity(
            teacher=teacher.checkpoint.fingerprint(),
            tokenizer=hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else "",
            data=data.fingerprint,
            top=min(top, teacher.vocab_size),
            vocabulary=teacher.vocab_size,
            dtype=str(teacher.dtype).removeprefix("torch."),
        )
        self.groups = list(_groups([len(ids) for ids in sequences.ids]))
        self._opened: dict[int, TensorFile] = {}
        self.check()

    @property
    def bytes_per_token(self) -> int:
        """Of one predicted position."""
        return self.identity.top * (self._index_dtype.itemsize + 2) + 4

    @property
    def nbytes(self) -> int:
        """Of all positions together."""
        return self.bytes_per_token * sum(len(ids) for ids in self._sequences.ids)

    @property
    def _index_dtype(self) -> torch.dtype:
        return torch.int16 if self.identity.vocabulary <= _SMALL_VOCABULARY else torch.int32

    def describe(self) -> str:
        """One line for logs and dry runs."""
        return (
            f"teacher cache {self.folder}: {self.bytes_per_token} bytes per token, {format_bytes(self.nbytes)} in all "
            f"({self.identity.top} tokens per position)"
        )

    def check(self) -> None:
        """Refuse a folder that holds another cache, or something else.

        Raises:
            StatisticsError: a cache of another teacher, tokenizer, data or size.
            UserError: no cache, and not empty.
        """
        file = self.folder / "cache.json"
        if not file.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise UserError(f"`teacher_cache={self.folder}` is neither a teacher cache nor an empty folder")
            if not self.folder.absolute().parent.is_dir():
                raise UserError(f"`teacher_cache`: the folder '{self.folder.absolute().parent}' does not exist")
            return
        try:
            known = read_json_object(file)
        except CheckpointError as error:
            raise StatisticsError(f"the cache cannot be read: {error.message}", hint="delete the cache") from error
        meant = {"format": _FORMAT, **asdict(self.identity)}
        for key, value in meant.items():
            if known.get(key) != value:
                raise StatisticsError(
                    f"{self.folder} caches another {key}: {str(known.get(key))[:16]}, not {str(value)[:16]}",
                    hint="name another folder, or delete this one",
                )

    def memory(self) -> MemoryPlan:
        """Where the bytes go while the largest group is captured."""
        return self._teacher.memory_plan(list(self._batches(max(self.groups, key=self._tokens))))

    def _tokens(self, group: Sequence[int]) -> int:
        return sum(len(self._sequences.ids[number]) for number in group)

    def capture(self) -> None:
        """Run the teacher over all groups that are not there yet."""
        plan = self.memory()
        plan.check()
        self.folder.mkdir(exist_ok=True)
        write_durably(
            self.folder / "cache.json", json.dumps({"format": _FORMAT, **asdict(self.identity)}, indent=2).encode()
        )
        _LOG.info(self.describe())
        for number, group in enumerate(self.groups):
            if self._is_good(number):
                continue
            tensors = self._captured(group, plan)
            write_durably(self._file(number), save(tensors, metadata={_DIGEST: _digest(tensors)}))
            self._opened.pop(number, None)

    def _is_good(self, group: int) -> bool:
        if not self._file(group).exists():
            return False
        try:
            self._open(group)
        except StatisticsError as error:
            _LOG.warning("%s: captured again", error.message)
            return False
        return True

    def _file(self, group: int) -> Path:
        return self.folder / f"group-{group:05d}.safetensors"

    @torch.no_grad()
    def _captured(self, group: Sequence[int], plan: MemoryPlan) -> dict[str, Tensor]:
        """Tensors of one group, its sequences' positions one after the other."""
        teacher = self._teacher
        batches = [teacher.on_device(batch) for batch in self._batches(group)]
        tokens = sum(batch.num_tokens for batch in batches)
        activations = teacher.activations(batches, plan)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        with announced(teacher, "capturing the teacher", tokens) as progress:
            teacher.embed(batches, activations)
            for layer in teacher.layers(resident=plan.resident, prefetch=plan.prefetch):
                progress.layer(layer.index)
                for number, batch in enumerate(batches):
                    activations[number] = teacher.run_layer(layer, batch, activations[number])
                    progress.advance(batch.num_tokens)
            for number, batch in enumerate(batches):
                parts += self._most_likely(batch, activations[number])
        index, value, tail = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return {"index": index, "log_prob": value, "log_tail": tail}

    def _batches(self, group: Sequence[int]) -> Iterator[TokenBatch]:
        size = max(1, 2048 // max(len(self._sequences.ids[number]) for number in group))
        for start in range(0, len(group), size):
            ids, mask = pad_right([self._sequences.ids[number] for number in group[start : start + size]], 0)
            yield TokenBatch(input_ids=ids, attention_mask=mask, task=torch.zeros(len(ids), dtype=torch.int64))

    def _most_likely(self, batch: TokenBatch, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        mask = batch.attention_mask
        real_BN = torch.ones_like(batch.input_ids, dtype=torch.bool) if mask is None else mask
        hidden_TD = hidden.to(self._teacher.device)[real_BN]
        token_T = batch.input_ids[real_BN]
        rows = head_rows(self._teacher.device, self.identity.vocabulary)
        for token_R, hidden_RD in zip(token_T.split(rows), hidden_TD.split(rows), strict=True):
            log_p = torch.log_softmax(row_logits(self._teacher, token_R, hidden_RD).float(), -1)
            value, index = log_p.topk(self.identity.top, -1)
            log_p.scatter_(-1, index, -torch.inf)
            tail = log_p.logsumexp(-1).clamp_min(-1e4)
            yield index.to(self._index_dtype).cpu(), value.half().cpu(), tail.cpu()

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        """Sequence -> its group, and where in the group's tensors it begins."""
        places = {}
        for number, group in enumerate(self.groups):
            start = 0
            for sequence in group:
                places[sequence] = (number, start)
                start += len(self._sequences.ids[sequence])
        return places

    def read(self, sequence: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, log-probabilities and log tail mass of the first `count` positions of a sequence.

        Raises:
            StatisticsError: the file is missing or damaged.
        """
        group, start = self._places[sequence]
        try:
            index, value, tail = self._open(group).rows(_NAMES, start, count)
        except CheckpointError as error:
            raise StatisticsError(error.message, hint=_RUN_AGAIN) from error
        return index, value, tail

    def _open(self, group: int) -> TensorFile:
        """The file of a group; at the first time all of it is read and checked."""
        file = self._file(group)
        if group not in self._opened:
            try:
                opened = open_tensor_file(file)
                tensors = opened.read(_NAMES)
            except CheckpointError as error:
                raise StatisticsError(error.message, hint=_RUN_AGAIN) from error
            if opened.metadata.get(_DIGEST) != _digest(tensors) or not self._fits(group, tensors):
                raise StatisticsError(f"{file} is damaged: its tensors are not what was captured", hint=_RUN_AGAIN)
            self._opened[group] = opened
        return self._opened[group]

    def _fits(self, group: int, tensors: Mapping[str, Tensor]) -> bool:
        """Whether shapes, dtypes and token ids are those of this cache."""
        tokens, top = sum(len(self._sequences.ids[number]) for number in self.groups[group]), self.identity.top
        wanted = {
            "index": ((tokens, top), self._index_dtype),
            "log_prob": ((tokens, top), torch.float16),
            "log_tail": ((tokens,), torch.float32),
        }
        if any((tuple(tensors[name].shape), tensors[name].dtype) != one for name, one in wanted.items()):
            return False
        index = tensors["index"]
        legal = not index.numel() or (int(index.min()) >= 0 and int(index.max()) < self.identity.vocabulary)
        return legal and not bool(tensors["log_prob"].isnan().any() or tensors["log_tail"].isnan().any())


class CachedTeacher:
    """Targets from a cache instead of a model."""

    def __init__(self, cache: TeacherCache) -> None:
        self._cache = cache

    def targets(
        self, ids_BN: Tensor, mask_BN: Tensor | None, real_BN: Tensor, number_B: Tensor, *, layers: bool
    ) -> tuple[TopTargets, list[Tensor]]:
        del mask_BN
        assert not layers, "a cache holds no hidden states"
        counts = real_BN.sum(-1).tolist()
        parts = [self._cache.read(number, count) for number, count in zip(number_B.tolist(), counts, strict=True)]
        index, value, tail = (torch.cat(tensors).to(ids_BN.device) for tensors in zip(*parts, strict=True))
        return TopTargets(index_TC=index.long(), log_prob_TC=value.float(), log_tail_T=tail), []


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in _NAMES:
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Sequences in order, in groups of about `_PART_TOKENS` tokens."""
    group: list[int] = []
    tokens = 0
    for number, length in enumerate(lengths):
        group.append(number)
        tokens += length
        if tokens >= _PART_TOKENS:
            yield group
            group, tokens = [], 0
    if group:
        yield group
