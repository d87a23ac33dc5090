"""`moetools inspect-routing`."""

from moetools.cli import options as opt
from moetools.cli.console import Session


def command(
    model: opt.Model,
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
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Measure how the routers use their experts, per layer and per task.

    Load, entropy, skew, balance loss, z-loss, and experts that get too little.
    """
    with Session(as_json=as_json, quiet=quiet, debug=debug) as session:
        from moetools.verbs.inspect.routing import inspect_routing

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
        report = inspect_routing(model, text, forward, stats=stats, save_stats=save_stats, progress=session.progress)
        session.result(report)
