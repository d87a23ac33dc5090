"""How many sequences are read, and how several tasks share them."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal, TypeVar

from moetools.arguments import LARGEST
from moetools.errors import UserError

_T = TypeVar("_T")

Samples = int | Literal["all"] | None
DEFAULT_TOKENS = 512 * 512


def check_sizes(seq_len: int, samples: Samples, batch_size: int | None) -> None:
    """Refuse numbers that cannot be used.

    Raises:
        UserError: naming the argument and its least value.
    """
    if isinstance(samples, str) and samples != "all":
        raise UserError(f"`samples={samples}` is no number of sequences", hint="legal: a number, or all")
    if isinstance(samples, int) and samples > LARGEST:
        raise UserError(f"`samples` is a number of {len(str(samples))} digits", hint="`samples=all` takes everything")
    for name, value, least in (("seq_len", seq_len, 2), ("samples", samples, 1), ("batch_size", batch_size, 1)):
        if isinstance(value, int) and value < least:
            raise UserError(f"`{name}={value}` is too small; the least is {least}")


def default_sequences(seq_len: int, tasks: int) -> int:
    """Sequences over all tasks together where nothing else is asked for: 512 of 512 tokens, of others as many tokens.

    At least one for every task.
    """
    return max(DEFAULT_TOKENS // seq_len, tasks)


def take(streams: Sequence[Iterator[_T]], samples: Samples, seq_len: int) -> list[list[_T]]:
    """What each stream gives: `samples` of it, "all", or with None its share of `default_sequences`."""
    if samples is None:
        return take_evenly(streams, default_sequences(seq_len, len(streams)))
    return [list(islice(stream, None if samples == "all" else samples)) for stream in streams]


def take_evenly(streams: Sequence[Iterator[_T]], total: int) -> list[list[_T]]:
    """`total` items, evenly; the first streams give the remainder, and where one ends the others give its share."""
    taken: list[list[_T]] = [[] for _ in streams]
    going, ended = list(range(len(streams))), 0
    while going:
        share, remainder = divmod(total - ended, len(going))
        still = []
        for position, number in enumerate(going):
            wanted = share + (position < remainder)
            taken[number] += islice(streams[number], wanted - len(taken[number]))
            if len(taken[number]) == wanted:
                still.append(number)
            else:
                ended += len(taken[number])
        if still == going:
            break
        going = still
    return taken
