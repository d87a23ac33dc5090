"""Options that several commands share, and how they become the verbs' option classes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetools.errors import UserError

if TYPE_CHECKING:
    from moetools.forward.streaming import ForwardOptions
    from moetools.text.options import DataOptions

DATA, RUNNING, RECIPE, STATISTICS = "Data", "Running", "Recipe", "Statistics"
OUTPUT, DISPLAY = "Output", "Display"
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")


def _option(panel: str, *names: str, help: str, metavar: str | None = None, **more: Any) -> Any:  # noqa: A002
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, **more)


Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="Folder of the checkpoint (Hugging Face layout, safetensors).", show_default=False
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.", show_default=False)]

Data = Annotated[
    list[str] | None,
    _option(
        DATA,
        "--data",
        metavar="NAME=PATH",
        help="Text: a .txt, .jsonl or .parquet file, a folder of them, hf:DATASET:CONFIG:SPLIT, or token ids in a "
        ".safetensors file. Repeat it for several tasks; the name may be left out.",
    ),
]
SeqLen = Annotated[int, _option(DATA, "--seq-len", metavar="N", help="Tokens per sequence.")]
Samples = Annotated[
    int | None, _option(DATA, "--samples", metavar="N", help="Sequences per task; all of them if not given.")
]
BatchSize = Annotated[
    int | None, _option(DATA, "--batch-size", metavar="N", help="Sequences per batch; about 2,048 tokens if not given.")
]
Pack = Annotated[
    bool,
    _option(
        DATA,
        "--pack/--no-pack",
        help="Join documents and cut windows of --seq-len tokens, or pad one sequence per document.",
    ),
]
Shuffle = Annotated[
    bool, _option(DATA, "--shuffle", help="Draw documents in seeded random order instead of file order.")
]
Seed = Annotated[int, _option(DATA, "--seed", metavar="N", help="Seed of everything that is drawn at random.")]
Tokenizer = Annotated[
    Path | None,
    _option(DATA, "--tokenizer", metavar="DIR", help="Folder of the tokenizer; the model's own if not given."),
]

Device = Annotated[
    str, _option(RUNNING, "--device", metavar="NAME", help="auto (CUDA where there is one), cpu, cuda or cuda:N.")
]
Dtype = Annotated[
    str,
    _option(
        RUNNING,
        "--dtype",
        metavar="NAME",
        help=f"Compute dtype: {', '.join(DTYPE_NAMES)}. auto is float32 on a CPU and bfloat16 on a GPU.",
        autocompletion=lambda: list(DTYPE_NAMES),
    ),
]
MemoryBudget = Annotated[
    str | None,
    _option(
        RUNNING,
        "--memory-budget",
        metavar="SIZE",
        help="Bound for weights and activations on the computing device, such as 8GiB or 500MB; "
        "four fifths of the free memory if not given.",
    ),
]
TrustRemoteCode = Annotated[
    bool, _option(RUNNING, "--trust-remote-code", help="Run Python code that comes with the checkpoint.")
]

Stats = Annotated[
    Path | None,
    _option(
        STATISTICS, "--stats", metavar="FILE", help="Take statistics saved by --save-stats instead of measuring them."
    ),
]
SaveStats = Annotated[
    Path | None,
    _option(
        STATISTICS, "--save-stats", metavar="FILE.safetensors", help="Save the measured statistics for later runs."
    ),
]

Ratio = Annotated[
    float | None,
    typer.Option(
        "--ratio", metavar="R", help="Share of experts to remove, 0 < R < 1; E experts become (1 - R) * E, rounded."
    ),
]
Combine = Annotated[
    str | None,
    _option(
        RECIPE,
        "--combine",
        metavar="HOW",
        help="average: sum the members' weights; subspace: sum them in the directions they share; neurons: keep the "
        "members' neurons the layer's output needs most. The method's own way if not given.",
        autocompletion=lambda: ["average", "subspace", "neurons"],
    ),
]
Rank = Annotated[
    float | None,
    _option(RECIPE, "--rank", metavar="SHARE", help="Share of the directions that --combine subspace keeps."),
]
Router = Annotated[
    str | None,
    _option(
        RECIPE,
        "--router",
        metavar="ROWS",
        help="Router rows of new experts: mean or centroid of the members', or fitted to their joint logit.",
        autocompletion=lambda: ["mean", "centroid", "fitted"],
    ),
]
Refit = Annotated[
    str | None,
    _option(
        RECIPE,
        "--refit",
        metavar="HOW",
        help="joint: solve all down projections of a layer anew for the original's hidden states; members: "
        "each for its members' mean output; none: leave them.",
        autocompletion=lambda: ["none", "joint", "members"],
    ),
]
Align = Annotated[
    bool | None,
    _option(RECIPE, "--align/--no-align", help="Put the members' neurons in one order before they are averaged."),
]
AllowUneven = Annotated[
    bool,
    _option(
        RECIPE,
        "--allow-uneven",
        help="Spread the experts over the layers by what they contribute; the output then loads with moetools.hf only.",
    ),
]
Heal = Annotated[
    int,
    _option(
        RECIPE,
        "--heal",
        metavar="STEPS",
        help="Train the result for that many steps of 4 sequences towards the original's predictions; both models must "
        "fit in memory.",
    ),
]
HealTrain = Annotated[
    str,
    _option(
        RECIPE,
        "--heal-train",
        metavar="WHAT",
        help="router: the routers alone; experts: routers and experts; all: every parameter.",
        autocompletion=lambda: ["router", "experts", "all"],
    ),
]
HealData = Annotated[
    list[str] | None,
    _option(
        RECIPE,
        "--heal-data",
        metavar="NAME=PATH",
        help="Text to heal on, in random order and whatever --samples; all the text of --data if not given.",
    ),
]
Sequential = Annotated[
    bool | None,
    _option(
        RECIPE,
        "--sequential/--one-shot",
        help="Measure behind the already compressed layers, or once on the original.",
    ),
]
Overwrite = Annotated[bool, _option(OUTPUT, "--overwrite", help="Replace OUT if it is a checkpoint.")]
Resume = Annotated[bool, _option(OUTPUT, "--resume", help="Go on from the last finished layer of an interrupted run.")]
DryRun = Annotated[
    bool, _option(OUTPUT, "--dry-run", help="Check everything and show sizes, memory and time; write nothing.")
]
Verify = Annotated[
    bool,
    _option(
        OUTPUT, "--verify/--no-verify", help="Reload OUT with stock transformers and compare it with what was meant."
    ),
]

Json = Annotated[bool, _option(DISPLAY, "--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, _option(DISPLAY, "--quiet", "-q", help="Show neither progress nor log lines.")]
Debug = Annotated[bool, _option(DISPLAY, "--debug", help="Show tracebacks, warnings and debug log lines.")]


def data_options(
    data: list[str] | None,
    *,
    seq_len: int,
    samples: int | None,
    batch_size: int | None,
    pack: bool,
    shuffle: bool,
    seed: int,
    tokenizer: Path | None,
) -> "DataOptions | None":
    """The text a verb reads; None if no `--data` was given."""
    from moetools.text.options import DataOptions

    if not data:
        return None
    return DataOptions(
        data=data,
        seq_len=seq_len,
        samples=samples,
        batch_size=batch_size,
        pack=pack,
        shuffle=shuffle,
        seed=seed,
        tokenizer=tokenizer,
    )


def forward_options(
    *, device: str, dtype: str, memory_budget: str | None, trust_remote_code: bool = False
) -> "ForwardOptions":
    """How models are run. Imports torch.

    Raises:
        UserError: a dtype or memory size that is none.
    """
    if dtype not in DTYPE_NAMES:
        raise UserError(f"--dtype '{dtype}' is not a compute dtype", hint=f"legal: {', '.join(DTYPE_NAMES)}")
    from moetools.forward.streaming import ForwardOptions
    from moetools.sizes import parse_bytes

    return ForwardOptions(
        device=device,
        dtype=dtype,  # type: ignore[arg-type]
        memory_budget=None if memory_budget is None else parse_bytes(memory_budget),
        trust_remote_code=trust_remote_code,
    )
