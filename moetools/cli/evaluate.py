"""`moetools evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from moetools.cli import options as opt
from moetools.cli.console import Session
from moetools.errors import GateError

Models = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODEL...", help="Folders of one or more checkpoints, compared in one table.", show_default=False
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option("--reference", metavar="MODEL", help="The original, for KL divergence and agreement."),
]
Choices = Annotated[
    list[str] | None,
    typer.Option("--choices", metavar="NAME=PATH", help="Multiple-choice items (.jsonl). Repeat it for several tasks."),
]
Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        metavar="METRIC<=VALUE",
        help="Exit with 3 if a model misses this bound, such as 'kl<=0.05'. Repeat it for several bounds.",
    ),
]


def command(
    models: Models,
    reference: Reference = None,
    choices: Choices = None,
    gate: Gates = None,
    data: opt.Data = None,
    seq_len: opt.SeqLen = 512,
    samples: opt.Samples = None,
    batch_size: opt.BatchSize = None,
    pack: opt.Pack = True,
    shuffle: opt.Shuffle = False,
    seed: opt.Seed = 0,
    tokenizer: opt.Tokenizer = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    memory_budget: opt.MemoryBudget = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Measure models side by side: perplexity per task, exact KL to the original, agreement, size and speed."""
    with Session(as_json=as_json, quiet=quiet, debug=debug) as session:
        from moetools.verbs.evaluate.verb import evaluate

        text = opt.data_options(
            data,
            seq_len=seq_len,
            samples=samples,
            batch_size=batch_size,
            pack=pack,
            shuffle=shuffle,
            seed=seed,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
        )
        forward = opt.forward_options(
            device=device, dtype=dtype, memory_budget=memory_budget, trust_remote_code=trust_remote_code
        )
        try:
            evaluation = evaluate(
                models,
                text,
                forward,
                reference=reference,
                choices=choices or (),
                gates=gate or (),
                progress=session.progress,
            )
        except GateError as missed:
            # The numbers are what one needs when a gate is missed.
            if (measured := getattr(missed, "evaluation", None)) is not None:
                session.result(measured)
            raise
        session.result(evaluation)
