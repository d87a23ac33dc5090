"""Options that every verb shares, and how they become tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetools.arguments import DATA, option, read
from moetools.errors import CheckpointError, UserError
from moetools.text.budget import Samples, check_sizes
from moetools.text.sources import parse_data_option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moetools.checkpoint.reader import Checkpoint
    from moetools.text.tokens import TokenData


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which text is used and how it is cut."""

    data: list[str] = option(
        [],
        "Text: a .txt, .jsonl or .parquet file, a folder of them, hf:DATASET:CONFIG:SPLIT, or token ids in a "
        ".safetensors file. Repeat it for several tasks; the name may be left out.",
        metavar="NAME=PATH",
        panel=DATA,
    )
    seq_len: int = option(512, "Tokens per sequence.", metavar="N", panel=DATA)
    samples: Samples = option(
        None,
        "Sequences per task, or all; 512 sequences of 512 tokens, shared evenly among the tasks, if not given.",
        metavar="N",
        panel=DATA,
    )
    batch_size: int | None = option(
        None, "Sequences per batch; about 2,048 tokens if not given.", metavar="N", panel=DATA
    )
    pack: bool = option(
        True,
        "Join documents and cut windows of `seq_len` tokens, or pad one sequence per document.",
        flags="--pack/--no-pack",
        panel=DATA,
    )
    shuffle: bool = option(False, "Draw documents in seeded random order instead of file order.", panel=DATA)
    seed: int = option(0, "Seed of everything that is drawn at random.", metavar="N", panel=DATA)
    tokenizer: Path | None = option(
        None, "Folder of the tokenizer; the model's own if not given.", metavar="DIR", panel=DATA
    )
    column: str | None = option(
        None,
        "Key or column that holds the text or the messages, where a record has several or calls it otherwise.",
        metavar="NAME",
        panel=DATA,
    )
    strict: bool = option(False, "Refuse the first record that cannot be used, instead of leaving it out.", panel=DATA)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", read("data", self.data, list[str]))
        samples: object = self.samples
        if isinstance(samples, str) and samples.isdecimal():
            object.__setattr__(self, "samples", int(samples))

    @property
    def sequences_per_batch(self) -> int:
        return self.batch_size or max(1, 2048 // self.seq_len)

    def paths(self) -> Iterator[tuple[str, Path]]:
        """(what it is, path) of every file and folder that is read."""
        for source in parse_data_option(self.data):
            if not source.is_hub:
                yield f"data '{source.task}'", source.path
        if self.tokenizer is not None:
            yield "`tokenizer`", self.tokenizer

    def check(self) -> None:
        """Refuse numbers that cannot be used, before anything is read.

        Raises:
            UserError: naming the option.
        """
        if not self.data:
            raise UserError("no text was given", hint="`data=FILE`, or `data=NAME=FILE` for several tasks")
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
        decoder_start=decoder_start(checkpoint),
    )


def decoder_start(checkpoint: "Checkpoint") -> int | None:
    """The id that an encoder-decoder model's decoder starts with; None for a decoder alone.

    Raises:
        CheckpointError: config.json does not say.
    """
    from moetools.architectures.base import find_architecture

    if not find_architecture(checkpoint.config, dense=True).stacks:
        return None
    found = checkpoint.config.get("decoder_start_token_id")
    if type(found) is not int:
        raise CheckpointError(
            f"{checkpoint.path}: config.json has no decoder_start_token_id",
            hint="T5 and its kin start with the id of padding: write it there",
        )
    return found


def load_model_tokenizer(options: DataOptions, checkpoint: "Checkpoint", vocab_size: int) -> "PreTrainedTokenizerBase":
    """The tokenizer named by `tokenizer`, else the model's own."""
    from moetools.text.tokenizer import load_tokenizer

    return load_tokenizer(
        options.tokenizer or checkpoint.path, vocab_size=vocab_size, trust_remote_code=options.trust_remote_code
    )
