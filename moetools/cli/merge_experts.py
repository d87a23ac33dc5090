"""`moetools merge-experts`."""

import shlex
from typing import Annotated

import typer

from moetools.cli import options as opt
from moetools.cli.console import Session
from moetools.plugins import plugin_names

METHODS = [*plugin_names("moetools.methods.merge"), "auto"]

To = Annotated[
    int | None, typer.Option("--to", metavar="N", help="Experts to end with in every layer; 1 makes the layers dense.")
]
Method = Annotated[
    str,
    typer.Option("--method", metavar="NAME", help=f"One of {', '.join(METHODS)}.", autocompletion=lambda: METHODS),
]


def command(
    context: typer.Context,
    model: opt.Model,
    out: opt.Out,
    to: To = None,
    ratio: opt.Ratio = None,
    method: Method = "hc-smoe",
    combine: opt.Combine = None,
    rank: opt.Rank = None,
    router: opt.Router = None,
    refit: opt.Refit = None,
    sequential: opt.Sequential = None,
    align: opt.Align = None,
    allow_uneven: opt.AllowUneven = False,
    heal: opt.Heal = 0,
    heal_train: opt.HealTrain = "all",
    heal_data: opt.HealData = None,
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
    stats: opt.Stats = None,
    save_stats: opt.SaveStats = None,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    verify: opt.Verify = True,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Write a checkpoint with fewer experts: similar ones are merged into one.

    Every cluster of experts becomes their weighted mean, with one router row. --to 1 makes every MoE layer dense.
    """
    with Session(as_json=as_json, quiet=quiet, debug=debug, resumable=not dry_run) as session:
        from moetools.verbs.reduce.verb import CompressOptions, merge_experts

        text, heal_text = (
            opt.data_options(
                given,
                seq_len=seq_len,
                samples=samples,
                batch_size=batch_size,
                pack=pack,
                shuffle=shuffle,
                seed=seed,
                tokenizer=tokenizer,
                trust_remote_code=trust_remote_code,
            )
            for given in (data, heal_data)
        )
        forward = opt.forward_options(
            device=device, dtype=dtype, memory_budget=memory_budget, trust_remote_code=trust_remote_code
        )
        choice = CompressOptions(
            method=method,
            target=to,
            ratio=ratio,
            stats=stats,
            save_stats=save_stats,
            overwrite=overwrite,
            resume=resume,
            dry_run=dry_run,
            verify=verify,
            seed=seed,
            combine=combine,
            rank=rank,
            router=router,
            refit=refit,
            sequential=sequential,
            align=align,
            allow_uneven=allow_uneven,
            heal=heal,
            heal_train=heal_train,
            heal_data=heal_text,
        )
        line = shlex.join(["moetools", *(context.obj or ())])
        session.result(merge_experts(model, out, text, forward, choice, command=line, progress=session.progress))
