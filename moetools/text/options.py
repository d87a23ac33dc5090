"""Options that every verb shares, and how they become tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetools.errors import UserError
from moetools.text.budget import Samples, check_sizes
from moetools.text.sources import parse_data_option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moetools.checkpoint.reader import Checkpoint
    from moetools.text.tokens import TokenData


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which text is used and how it is cut.

    Attributes:
        data: `--data` values, `path` or `name=path`.
        seq_len: tokens per sequence.
        samples: sequences per task, or "all" there are; None shares 512 sequences of 512 tokens evenly among the tasks.
        batch_size: sequences per batch; None aims at 2,048 tokens.
        pack: join documents and cut windows of `seq_len`; otherwise one padded sequence per document.
        shuffle, seed: draw documents in seeded random order instead of file order.
        tokenizer: folder of the tokenizer; None takes the model's own.
        column: the key or column that holds the text or the messages, where a record has several or calls it otherwise.
        strict: refuse the first record that cannot be used, instead of leaving it out.
        trust_remote_code: run a tokenizer that is Python code of the checkpoint.
    """

    data: Sequence[str]
    seq_len: int = 512
    samples: Samples = None
    batch_size: int | None = None
    pack: bool = True
    shuffle: bool = False
    seed: int = 0
    tokenizer: Path | None = None
    column: str | None = None
    strict: bool = False
    trust_remote_code: bool = False

    @property
    def sequences_per_batch(self) -> int:
        return self.batch_size or max(1, 2048 // self.seq_len)

    def check(self) -> None:
        """Refuse numbers that cannot be used, before anything is read.

        Raises:
            UserError: naming the option.
        """
        if not self.data:
            raise UserError("no text was given", hint="`data=FILE` or `data=NAME=FILE`, several for several tasks")
        check_sizes(self.seq_len, self.samples, self.batch_size)


def load_tokens(options: DataOptions, checkpoint: "Checkpoint", vocab_size: int) -> "TokenData":
    """Token batches of all tasks, through the model's own tokenizer or the one named."""
    from moetools.text.tokens import load_token_data

    options.check()
    sources = parse_data_option(options.data)
    tokenizer = None
    if not all(source.is_tokens for source in sources):
        tokenizer = load_model_tokenizer(options, checkpoint, vocab_size)
    return load_token_data(
        sources,
        tokenizer,
        seq_len=options.seq_len,
        samples=options.samples,
        batch_size=options.sequences_per_batch,
        pack=options.pack,
        seed=options.seed,
        shuffle=options.shuffle,
        vocab_size=vocab_size,
        column=options.column,
        strict=options.strict,
    )


def load_model_tokenizer(options: DataOptions, checkpoint: "Checkpoint", vocab_size: int) -> "PreTrainedTokenizerBase":
    """The tokenizer named by `--tokenizer`, else the model's own."""
    from moetools.text.tokenizer import load_tokenizer

    return load_tokenizer(
        options.tokenizer or checkpoint.path, vocab_size=vocab_size, trust_remote_code=options.trust_remote_code
    )
