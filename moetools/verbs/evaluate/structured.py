"""Answers to chats that ask for JSON or tool calls: how many are valid."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from moetools.errors import DataError
from moetools.forward.generate import continuations, end_tokens, generation_plan
from moetools.forward.memory import MemoryPlan
from moetools.forward.streaming import StreamedModel
from moetools.text.options import DataOptions
from moetools.text.sources import parse_data_option
from moetools.text.structured import Question, questions
from moetools.text.tokens import TokenBatch

VALID = ("valid_json", "valid_calls")


@dataclass(frozen=True, kw_only=True)
class StructuredMetrics:
    """Greedy answers of one model.

    Attributes:
        valid_json: share of answers that end and are JSON of the schema; None if no chat asks for it.
        valid_calls: share of answers whose calls are all of a tool that there is, with arguments that it takes, at
            least one; None if no chat asks for it.
        json_prompts, call_prompts: their numbers.
    """

    valid_json: float | None
    valid_calls: float | None
    json_prompts: int
    call_prompts: int


class Structured:
    """Asks every model the same.

    Args:
        count: chats of each task at most.
        tokens: of an answer at most.

    Raises:
        UserError: jsonschema is not installed.
        DataError: no chat asks for JSON or tool calls.
    """

    def __init__(self, text: DataOptions, tokenizer: PreTrainedTokenizerBase, *, count: int, tokens: int) -> None:
        self._tokenizer, self._tokens = tokenizer, tokens
        sources = parse_data_option(text.data)
        self._asked = [one for source in sources for one in questions(source, tokenizer, count, text.column)]
        if not self._asked:
            hint = "messages with a 'response_format', or with 'tools' that the assistant calls"
            raise DataError("`structured`: no chat in the data asks for JSON or tool calls", hint=hint)
        self._asked.sort(key=lambda question: len(question.ids))
        self._batches = list(_batches(self._asked, text.sequences_per_batch))

    def measures(self, metric: str) -> bool:
        """Whether there is a chat for `valid_json` or `valid_calls`."""
        return any((one.schema is None) == (metric == "valid_calls") for one in self._asked)

    def plan(self, model: StreamedModel) -> MemoryPlan:
        return generation_plan(model, self._batches, self._tokens)

    def __call__(self, model: StreamedModel) -> StructuredMetrics:
        eos = self._tokenizer.eos_token_id
        ends = end_tokens(model) | ({eos} if eos is not None else set())
        found = continuations(model, self._batches, self._tokens, self.plan(model), end_ids=ends)
        rows = [row for part in found for row in part.tolist()]
        valid = [self._is_valid(one, row, ends) for one, row in zip(self._asked, rows, strict=True)]
        made = [right for one, right in zip(self._asked, valid, strict=True) if one.schema is not None]
        called = [right for one, right in zip(self._asked, valid, strict=True) if one.schema is None]
        return StructuredMetrics(
            valid_json=sum(made) / len(made) if made else None,
            valid_calls=sum(called) / len(called) if called else None,
            json_prompts=len(made),
            call_prompts=len(called),
        )

    def _is_valid(self, question: Question, row: list[int], ends: frozenset[int]) -> bool:
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        skip = question.schema is not None
        return question.answered_by(self._tokenizer.decode(row[:end], skip_special_tokens=skip))


def _batches(asked: Sequence[Question], most: int) -> list[TokenBatch]:
    """In order, of one length each: nothing is padded."""
    groups: list[list[list[int]]] = []
    for question in asked:
        if not groups or len(groups[-1]) == most or len(groups[-1][0]) != len(question.ids):
            groups.append([])
        groups[-1].append(question.ids)
    return [
        TokenBatch(input_ids=torch.tensor(ids), attention_mask=None, task=torch.zeros(len(ids), dtype=torch.int64))
        for ids in groups
    ]
