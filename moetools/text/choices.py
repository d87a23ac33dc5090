"""Multiple choice: items from .jsonl files, and batches whose log-likelihoods decide each item.

The model's answer to an item is the choice with the highest log p(choice | prompt) / bytes(choice): bytes, not tokens,
so that the measure does not depend on the tokenizer (`acc_norm` of EleutherAI's evaluation harness).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moetools.errors import DataError
from moetools.text.documents import iter_json_objects
from moetools.text.records import text_field
from moetools.text.sources import DataSource, Skipped, format_suffix, usable
from moetools.text.tokenizer import encode, padding_id, separator_ids
from moetools.text.tokens import TokenBatch, pad_right

_HINT = 'write {"prompt": "...", "choices": ["...", "..."], "answer": 0}'


@dataclass(frozen=True, kw_only=True)
class ChoiceItem:
    """One question.

    Attributes:
        prompt: the text before the choice; may be empty.
        choices: two or more candidate continuations, none empty.
        answer: index of the true one.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class ChoiceSet:
    """The items of one file, in order, and what the set is called."""

    name: str
    items: tuple[ChoiceItem, ...]


@dataclass(frozen=True, kw_only=True)
class ChoiceBatch:
    """B (item, choice) pairs as sequences of prompt and choice.

    Attributes:
        tokens: separator, prompt and choice; its `task` is 0.
        score_mask: true at the choice's tokens; log p(choice | prompt) is the sum of log p(input_ids[b, n] |
            input_ids[b, :n]) over them. Position 0 is never true.
        item: index into `ChoiceSet.items`, int64.
        choice: index into that item's `choices`, int64.
        num_bytes: UTF-8 length of the choice's text, int64.
    """

    tokens: TokenBatch
    score_mask: Bool[Tensor, "B N"]
    item: Int[Tensor, "B"]
    choice: Int[Tensor, "B"]
    num_bytes: Int[Tensor, "B"]


@dataclass(frozen=True, kw_only=True)
class _Scored:
    ids: list[int]
    start: int  # first position of the choice's tokens
    item: int
    choice: int
    num_bytes: int


def load_choices(source: DataSource) -> ChoiceSet:
    """The items of a .jsonl file with one {"prompt", "choices", "answer"} per line; other keys are ignored.

    None is left out: what the others measure would be another test.

    Raises:
        DataError: a missing, empty or malformed file, naming file and line.
    """
    file = source.path
    if source.is_hub or file.is_dir() or format_suffix(source.files()[0]) not in (".jsonl", ".ndjson", ".json"):
        raise DataError(f"{source.location} is not a .jsonl file of multiple-choice items", hint=_HINT)
    records = usable((_found(*pair) for pair in iter_json_objects(file)), str(file), Skipped(strict=True))
    return ChoiceSet(name=source.task, items=tuple(_item(record, where) for where, record in records))


def choice_batches(
    choices: ChoiceSet, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, batch_size: int
) -> Iterator[ChoiceBatch]:
    """Batches of all (item, choice) pairs, shortest sequences first so that little is padded.

    The choice's tokens are those of prompt + choice behind the longest prefix shared with the prompt's own tokens:
    where the tokenizer merges across the border, the merged token counts as the choice's. A prompt too long for
    `seq_len` loses its beginning, the separator stays.

    Raises:
        DataError: a choice that does not fit into `seq_len` or leaves no token to score.
    """
    scored = sorted(_scored(choices, tokenizer, seq_len), key=lambda row: len(row.ids))
    for start in range(0, len(scored), batch_size):
        rows = scored[start : start + batch_size]
        ids, mask = pad_right([torch.tensor(row.ids) for row in rows], padding_id(tokenizer))
        behind = torch.arange(ids.shape[1]) >= torch.tensor([row.start for row in rows])[:, None]
        yield ChoiceBatch(
            tokens=TokenBatch(input_ids=ids, attention_mask=mask, task=torch.zeros(len(rows), dtype=torch.int64)),
            score_mask=behind if mask is None else behind & mask,
            item=torch.tensor([row.item for row in rows]),
            choice=torch.tensor([row.choice for row in rows]),
            num_bytes=torch.tensor([row.num_bytes for row in rows]),
        )


def _scored(choices: ChoiceSet, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Iterator[_Scored]:
    separator = separator_ids(tokenizer)
    for number, item in enumerate(choices.items):
        prompt, *joined = encode(tokenizer, [item.prompt, *(item.prompt + choice for choice in item.choices)])
        for choice, ids in enumerate(joined):
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False)))
            # Without a separator nothing predicts the first token, so it cannot count.
            first = shared if separator else max(shared, 1)
            tail = ids[first:]
            context = ids[:first][max(0, len(separator) + len(ids) - seq_len) :]
            _check_fits(tail, len(separator or ids[:1]), seq_len, f"{choices.name}: item {number}, choice {choice}")
            yield _Scored(
                ids=separator + context + tail,
                start=len(separator) + len(context),
                item=number,
                choice=choice,
                num_bytes=len(item.choices[choice].encode()),
            )


def _check_fits(tail: list[int], needed: int, seq_len: int, where: str) -> None:
    if not tail:
        raise DataError(f"{where} adds no token to its prompt that could be scored", hint="make the choice longer")
    if len(tail) + needed > seq_len:
        raise DataError(
            f"{where} has {len(tail)} tokens and needs {needed} before it, more than `seq_len={seq_len}`",
            hint=f"use `seq_len={len(tail) + needed}` or more",
        )


def _found(where: str, record: dict[str, Any] | DataError) -> tuple[str, dict[str, Any]] | DataError:
    return record if isinstance(record, DataError) else (where, record)


def _item(record: dict[str, Any], where: str) -> ChoiceItem:
    missing = [key for key in ("prompt", "choices", "answer") if key not in record]
    if missing:
        raise DataError(f"{where}: no '{missing[0]}'; the keys are {', '.join(record) or '(none)'}", hint=_HINT)
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{where}: 'choices' must be a list of two or more strings", hint=_HINT)
    texts = tuple(text_field({f"choice {i}": text}, f"choice {i}", where) for i, text in enumerate(choices))
    if "" in texts:
        raise DataError(f"{where}: choice {texts.index('')} is empty", hint=_HINT)
    if type(answer) is not int or not 0 <= answer < len(texts):
        raise DataError(f"{where}: 'answer' is {answer!r}; legal is an index from 0 to {len(texts) - 1}", hint=_HINT)
    return ChoiceItem(prompt=text_field(record, "prompt", where), choices=texts, answer=answer)
