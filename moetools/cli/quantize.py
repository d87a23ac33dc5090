"""`moetools quantize`."""

import shlex
from typing import Annotated

import typer

from moetools.cli import options as opt
from moetools.cli.console import Session
from moetools.plugins import plugin_names

METHODS = plugin_names("moetools.methods.quantize")
SCHEMES = "w8a16, w6a16, w5a16, w4a16, w3a16, w2a16, ternary, fp8, fp8-block, mxfp4, nvfp4, w8a8, mixed, sub1"

Scheme = Annotated[str, typer.Option("--scheme", metavar="NAME", help=f"One of {SCHEMES}.")]
Method = Annotated[
    str,
    typer.Option("--method", metavar="NAME", help=f"One of {', '.join(METHODS)}.", autocompletion=lambda: METHODS),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        metavar="N",
        help="Columns that share a scale; 0: one per row. [default: largest of 128, 64, 32, 16 that divides all rows]",
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        "--bits",
        metavar="B",
        help="Average bits per routed-expert weight, of codes (mixed, 2.5) or of all that is stored (sub1, 0.9).",
    ),
]
ExpertsOnly = Annotated[bool, typer.Option("--experts-only", help="Quantize the routed experts and nothing else.")]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="SCHEME",
        help="Scheme of the attention, sub1:BITS, or none. [default: --scheme; w4a16 with ternary, mixed and sub1]",
    ),
]
Embeddings = Annotated[
    str | None,
    typer.Option(
        "--embeddings",
        metavar="SCHEME",
        help="Scheme of embeddings and head, or sub1:BITS; for the formats moetools and gguf. [default: none]",
    ),
]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="Integers with a zero point.")]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME",
        help="auto, compressed-tensors, moetools (any mix), or gguf: also write OUT/model.gguf.",
    ),
]
Target = Annotated[
    str, typer.Option("--target", metavar="LOADER", help="What must load the result: transformers, vllm or both.")
]
Dequantize = Annotated[
    bool, typer.Option("--dequantize", help="Accept a quantized MODEL and start from its dequantized weights.")
]
Expand = Annotated[bool, typer.Option("--expand", help="Write the plain checkpoint that a quantized MODEL stands for.")]


def command(
    context: typer.Context,
    model: opt.Model,
    out: opt.Out,
    scheme: Scheme = "w4a16",
    method: Method = "gptq",
    group_size: GroupSize = None,
    bits: Bits = None,
    experts_only: ExpertsOnly = False,
    attention: Attention = None,
    embeddings: Embeddings = None,
    asymmetric: Asymmetric = False,
    format_: Format = "auto",
    target: Target = "transformers",
    dequantize: Dequantize = False,
    expand: Expand = False,
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
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    verify: opt.Verify = True,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Write a checkpoint whose weights take fewer bits: from int8 down to below one bit per weight.

    Routers and norms stay as they are; embeddings and the head do unless --embeddings is given. --expand turns a
    quantized checkpoint into a plain one.
    """
    with Session(as_json=as_json, quiet=quiet, debug=debug, resumable=not dry_run) as session:
        from moetools.verbs.quantize.verb import QuantizeOptions, quantize

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
        choice = QuantizeOptions(
            scheme=scheme,
            method=method,
            group_size=group_size,
            bits=bits,
            experts_only=experts_only,
            attention=attention,
            embeddings=embeddings,
            asymmetric=asymmetric,
            format=format_,
            target=target,
            dequantize=dequantize,
            expand=expand,
            overwrite=overwrite,
            resume=resume,
            dry_run=dry_run,
            verify=verify,
            seed=seed,
        )
        line = shlex.join(["moetools", *(context.obj or ())])
        session.result(quantize(model, out, text, forward, choice, command=line, progress=session.progress))
