"""`moetools route-tasks`."""

import shlex
from typing import Annotated

import typer

from moetools.cli import options as opt
from moetools.cli.console import Session
from moetools.plugins import plugin_names

SCORES = plugin_names("moetools.methods.route")
ROUTING, CLASSIFIER = "Routing level", "Task by prompt"

Keep = Annotated[int | None, typer.Option("--keep", metavar="N", help="Experts of a task in every layer.")]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        help="Instead of --keep: as many experts as it takes to keep this part of a task's score in every layer.",
    ),
]
Score = Annotated[
    str,
    typer.Option(
        "--score",
        metavar="NAME",
        help=f"What makes an expert worth keeping for a task: {', '.join(SCORES)}.",
        autocompletion=lambda: SCORES,
    ),
]
Union = Annotated[
    list[str] | None,
    typer.Option("--union", metavar="A+B", help="One more checkpoint for several tasks, or all; may be repeated."),
]
Refit = Annotated[
    str,
    typer.Option(
        "--refit",
        metavar="HOW",
        help="joint: solve the down projections anew on the task's text; none: leave them.",
        autocompletion=lambda: ["none", "joint"],
    ),
]
TuneRouter = Annotated[
    int,
    typer.Option(
        "--tune-router",
        metavar="STEPS",
        help="Train the tasks' routers towards the full model; both models must fit in memory.",
    ),
]
Test = Annotated[
    list[str] | None,
    typer.Option(
        "--test",
        metavar="NAME=PATH",
        help="Held-out text of every task; if not given, the last fifth of each task's text is held out.",
        rich_help_panel=opt.DATA,
    ),
]
Level = Annotated[
    list[str] | None,
    typer.Option(
        "--level",
        metavar="UNIT",
        help="Also measure the full model with experts chosen per sentence or per sequence; may be repeated.",
        rich_help_panel=ROUTING,
        autocompletion=lambda: ["token", "sentence", "sequence", "task"],
    ),
]
Pool = Annotated[
    list[str] | None,
    typer.Option(
        "--pool",
        metavar="RULE",
        help="How a unit's scores are pooled: mean-logits, mean-probs, seq-topk; all three if not given.",
        rich_help_panel=ROUTING,
        autocompletion=lambda: ["mean-logits", "mean-probs", "seq-topk"],
    ),
]
Classifier = Annotated[
    str,
    typer.Option(
        "--classifier",
        metavar="KIND",
        help="How a prompt's task is found: ngrams (of token ids), router (probabilities over the prefix), none.",
        rich_help_panel=CLASSIFIER,
        autocompletion=lambda: ["ngrams", "router", "none"],
    ),
]
Prefix = Annotated[
    int, typer.Option("--prefix", metavar="N", help="Tokens of the prompt that count.", rich_help_panel=CLASSIFIER)
]
Threshold = Annotated[
    float,
    typer.Option(
        "--threshold",
        metavar="P",
        help="Prompts that are less sure of their task than this use all experts.",
        rich_help_panel=CLASSIFIER,
    ),
]
Report = Annotated[
    bool, typer.Option("--report/--no-report", help="Write report.html with the plots.", rich_help_panel=opt.OUTPUT)
]


def command(
    context: typer.Context,
    model: opt.Model,
    out: opt.Out,
    keep: Keep = None,
    top_p: TopP = None,
    score: Score = "output",
    union: Union = None,
    refit: Refit = "none",
    tune_router: TuneRouter = 0,
    data: opt.Data = None,
    test: Test = None,
    seq_len: opt.SeqLen = 512,
    samples: opt.Samples = None,
    batch_size: opt.BatchSize = None,
    pack: opt.Pack = True,
    shuffle: opt.Shuffle = False,
    seed: opt.Seed = 0,
    tokenizer: opt.Tokenizer = None,
    level: Level = None,
    pool: Pool = None,
    classifier: Classifier = "ngrams",
    prefix: Prefix = 64,
    threshold: Threshold = 0.8,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    memory_budget: opt.MemoryBudget = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    verify: opt.Verify = True,
    report: Report = True,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Choose each task's experts and write a small checkpoint per task.

    OUT/TASK holds a checkpoint with the task's experts, OUT/task_routing.json the same choice for the full checkpoint
    at run time (import moetools.hf). Every task is tested on the held-out text of every other.
    """
    with Session(as_json=as_json, quiet=quiet, debug=debug, resumable=not dry_run) as session:
        from moetools.errors import UserError
        from moetools.verbs.route.verb import RouteOptions, route_tasks

        text = opt.data_options(
            data,
            seq_len=seq_len,
            samples=samples,
            batch_size=batch_size,
            pack=pack,
            shuffle=shuffle,
            seed=seed,
            tokenizer=tokenizer,
        )
        if text is None:
            raise UserError("experts are chosen on text, and there is none", hint="--data NAME=FILE for every task")
        forward = opt.forward_options(
            device=device, dtype=dtype, memory_budget=memory_budget, trust_remote_code=trust_remote_code
        )
        choice = RouteOptions(
            score=score,
            keep=keep,
            top_p=top_p,
            unions=tuple(union or ()),
            refit=refit,
            tune_router=tune_router,
            levels=tuple(level or ()),
            pools=tuple(pool or ()),
            classifier=classifier,
            prefix=prefix,
            threshold=threshold,
            test=tuple(test or ()),
            report=report,
            overwrite=overwrite,
            resume=resume,
            dry_run=dry_run,
            verify=verify,
            seed=seed,
        )
        line = shlex.join(["moetools", *(context.obj or ())])
        session.result(route_tasks(model, out, text, forward, choice, command=line, progress=session.progress))
