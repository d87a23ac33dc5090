"""The text of several tasks: loaded once, checked, split into what experts are chosen on and what judges them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.errors import DataError, UserError
from moetools.text.options import DataOptions, load_tokens
from moetools.text.sources import DataSource, iter_documents, parse_data_option
from moetools.text.task_names import RULE, folder_fault, name_fault
from moetools.text.tokens import TokenBatch, TokenData

HELD_OUT_SHARE = 0.2
MIN_SLOTS = 32
"""Least number of routed slots an expert must get on average before a task's scores are believed."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Tokens of all tasks.

    Attributes:
        calibration: what experts are chosen on.
        test: held-out sequences, the same tasks in the same order.
        held_out: whether `test` was cut from the end of each task's calibration text rather than given.
    """

    calibration: TokenData
    test: TokenData
    held_out: bool

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.calibration.tasks


def check_task_names(tasks: Sequence[str]) -> None:
    """Refuse names that cannot be folders beside each other, and fewer than two tasks.

    Raises:
        UserError: naming the task.
    """
    if len(tasks) < 2:
        raise UserError(
            f"one task only ('{tasks[0]}'): there is nothing to route between" if tasks else "no task was given",
            hint="`data=NAME=FILE` for every task; for one task, prune-experts with its text does the same",
        )
    seen: dict[str, str] = {}
    for task in tasks:
        fault = name_fault(task) or folder_fault(task)
        if fault:
            raise UserError(
                f"task name '{task}' cannot be a folder of the output: {fault}",
                hint=f"{RULE}, beginning with a letter or digit: `data=NAME=FILE`",
            )
        if task.lower() in seen:
            raise UserError(f"tasks '{seen[task.lower()]}' and '{task}' differ in case only", hint="rename one of them")
        seen[task.lower()] = task


def load_task_data(
    data: DataOptions, test: Sequence[str], source: Checkpoint, vocab_size: int, *, top_k: int, num_experts: int
) -> TaskData:
    """All tasks' tokens; without `test`, the last fifth of each task's sequences is held out.

    Raises:
        UserError: illegal names, one task only, tests of other tasks, or overlapping data.
        DataError: a task with too few tokens or sequences for its experts.
    """
    data.check()
    sources = parse_data_option(data.data)
    check_task_names([one.task for one in sources])
    tests = parse_data_option(test)
    if tests and [one.task for one in tests] != [one.task for one in sources]:
        raise UserError(
            f"`test` is for the tasks {', '.join(one.task for one in tests)}, `data` for "
            f"{', '.join(one.task for one in sources)}",
            hint="name the same tasks in the same order, or leave `test` out to hold out a fifth",
        )
    _check_overlap(sources, tests, data.column)
    tokens = load_tokens(data, source, vocab_size)
    if tests:
        given = load_tokens(replace(data, data=list(test), samples="all", shuffle=False), source, vocab_size)
        found = TaskData(calibration=tokens, test=given, held_out=False)
    else:
        found = TaskData(
            calibration=part_of_text(tokens, held_out=False), test=part_of_text(tokens, held_out=True), held_out=True
        )
    _check_sizes(found, top_k, num_experts)
    _check_shared_sequences(found)
    return found


def task_tokens(data: TokenData, task: str) -> TokenData:
    """One task's batches alone."""
    index = data.tasks.index(task)
    batches = tuple(
        replace(batch, task=torch.zeros_like(batch.task)) for batch in data.batches if int(batch.task[0]) == index
    )
    return TokenData(
        tasks=(task,), batches=batches, fingerprint=_digest(f"{data.fingerprint}:{task}"), seq_len=data.seq_len
    )


def by_sequence(data: TokenData) -> tuple[TokenData, Tensor]:
    """The same tokens with every sequence as a task of its own, and the task of each sequence, [S]."""
    batches, tasks, start = [], [], 0
    for batch in data.batches:
        size = len(batch.input_ids)
        batches.append(replace(batch, task=torch.arange(start, start + size)))
        tasks.append(batch.task)
        start += size
    names = tuple(str(number) for number in range(start))
    labelled = TokenData(tasks=names, batches=tuple(batches), fingerprint=data.fingerprint, seq_len=data.seq_len)
    return labelled, torch.cat(tasks)


def prefixes(data: TokenData, length: int) -> TokenData:
    """The first `length` tokens of every sequence."""
    return map_batches(
        data,
        lambda batch: replace(
            batch,
            input_ids=batch.input_ids[:, :length].contiguous(),
            attention_mask=None if batch.attention_mask is None else batch.attention_mask[:, :length].contiguous(),
        ),
        f"prefix {length}",
    )


def prompts(data: TokenData) -> list[Tensor]:
    """Every sequence's real tokens."""
    found = []
    for batch in data.batches:
        masks = [slice(None)] * len(batch.input_ids) if batch.attention_mask is None else list(batch.attention_mask)
        found += [ids[mask] for ids, mask in zip(batch.input_ids, masks, strict=True)]
    return found


def map_batches(data: TokenData, change: Callable[[TokenBatch], TokenBatch], what: str) -> TokenData:
    """The same tasks with changed batches."""
    return TokenData(
        tasks=data.tasks,
        batches=tuple(change(batch) for batch in data.batches),
        fingerprint=_digest(f"{data.fingerprint}:{what}"),
        seq_len=data.seq_len,
    )


def sequences_per_task(data: TokenData) -> dict[str, int]:
    """Number of sequences, in task order."""
    counts = dict.fromkeys(data.tasks, 0)
    for batch in data.batches:
        counts[data.tasks[int(batch.task[0])]] += len(batch.input_ids)
    return counts


def part_of_text(data: TokenData, *, held_out: bool) -> TokenData:
    """The last fifth of each task's sequences, or all before it: neighbours often are of one document."""
    counts = sequences_per_task(data)
    few = {task: count for task, count in counts.items() if count < 2}
    if few:
        task, count = next(iter(few.items()))
        raise DataError(
            f"task '{task}' has {count} sequence, and a fifth is to be held out",
            hint="give more text, a shorter `seq_len`, or held-out text with `test`",
        )
    kept = {task: count - max(1, round(HELD_OUT_SHARE * count)) for task, count in counts.items()}
    seen = dict.fromkeys(data.tasks, 0)
    batches = []
    for batch in data.batches:
        task = data.tasks[int(batch.task[0])]
        position = seen[task] + torch.arange(len(batch.input_ids))
        seen[task] += len(batch.input_ids)
        rows = ((position >= kept[task]) == held_out).nonzero()[:, 0]
        if len(rows):
            mask = batch.attention_mask
            batches.append(
                TokenBatch(
                    input_ids=batch.input_ids[rows],
                    attention_mask=None if mask is None else mask[rows],
                    task=batch.task[rows],
                )
            )
    name = "held out" if held_out else "chosen on"
    return TokenData(
        tasks=data.tasks,
        batches=tuple(batches),
        fingerprint=_digest(f"{data.fingerprint}:{name}"),
        seq_len=data.seq_len,
    )


def _check_sizes(data: TaskData, top_k: int, num_experts: int) -> None:
    least = -(-MIN_SLOTS * num_experts // top_k)
    for task, tokens in data.calibration.tokens_per_task().items():
        if tokens < least:
            raise DataError(
                f"task '{task}' has {tokens:,} tokens to choose its experts on: {tokens * top_k / num_experts:.0f} "
                f"slots for each of {num_experts} experts at top-{top_k}, fewer than {MIN_SLOTS}",
                hint=f"give at least {least:,} tokens"
                + (" beside the fifth that is held out" if data.held_out else ""),
            )


def _check_overlap(sources: Sequence[DataSource], tests: Sequence[DataSource], column: str | None) -> None:
    """Refuse a document that stands in two tasks, or in the text that judges as well as in the text that chooses."""
    labelled = [(one.task, one) for one in sources] + [(f"{one.task} (`test`)", one) for one in tests]
    places: dict[str, tuple[str, str]] = {}
    shared: dict[tuple[str, str], int] = {}
    locations: dict[str, str] = {}
    for label, source in labelled:
        other = locations.setdefault(source.location, label)
        if other != label:
            raise UserError(
                f"tasks '{other}' and '{label}' share their data: {source.location}", hint="give each task its own text"
            )
        if source.is_tokens or source.is_hub:
            continue
        for digest in sorted({_digest(_plain(document)) for document in iter_documents(source, column=column)}):
            known = places.setdefault(digest, (label, source.location))
            if known[0] != label:
                shared[known[0], label] = shared.get((known[0], label), 0) + 1
    for (one, other), count in shared.items():
        raise UserError(
            f"tasks '{one}' and '{other}' share {count} document{'s' if count > 1 else ''}",
            hint="experts cannot be told apart on the same text; give each task its own",
        )


def _check_shared_sequences(data: TaskData) -> None:
    """The same, of token windows, for data that is not read as documents."""
    places: dict[bytes, str] = {}
    shared: dict[tuple[str, str], int] = {}
    for part, suffix in ((data.calibration, ""), (data.test, "" if data.held_out else " (`test`)")):
        for batch in part.batches:
            task = part.tasks[int(batch.task[0])] + suffix
            for ids in batch.input_ids:
                known = places.setdefault(ids.numpy().tobytes(), task)
                if known != task:
                    shared[known, task] = shared.get((known, task), 0) + 1
    for (one, other), count in shared.items():
        raise UserError(
            f"tasks '{one}' and '{other}' share {count} sequence{'s' if count > 1 else ''} of tokens",
            hint="give each task its own text",
        )


def _plain(document: object) -> str:
    text, messages = getattr(document, "text", None), getattr(document, "messages", None)
    return text if text is not None else repr(messages)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
