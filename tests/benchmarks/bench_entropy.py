"""Bits and speed of entropy codes for quantized weights: moetools' own beside QMoE's dictionary.

`python tests/benchmarks/bench_entropy.py [--rows 1024] [--columns 4096] [--model DIR] [--device cpu]
[--tables codes chunks decoders]`

Sources are Gaussian and Laplace weights of a real matrix's shape and the expert matrices of a model, rounded without
compensation: ternary as QMoE does ({min, 0, max} of each row; and with 88.5 % zeros, what its dictionary is made for),
and on moetools' entropy grid at several rates. Bits count everything on disk but the scales of ternary rows. "entropy"
is the empirical entropy of the codes under one distribution for the whole matrix: codes with a table for some of the
columns can be below it. A second table shows what the size of a chunk costs, a third how fast each decoder is: the one
of the older layout, and of the chunked layout the reference (of 65,536 weights), array operations and numba with one
thread and with `--threads`, as codes and as bfloat16, each with its ratio to the older layout.
"""

import argparse
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "formats"))

import lanes_writer
import qmoe_dictionary

from moetools.checkpoint.reader import open_checkpoint
from moetools.formats.entropy import chunks, coder, hold, pack, unpack_many, with_arrays
from moetools.grids.base import Params, Quantized
from moetools.grids.entropy import EntropyGrid

MODEL = Path(__file__).resolve().parents[3] / "shared" / "models" / "mixtral-8x9m"
RATES = (0.5, 0.8, 1.0, 2.0, 3.0)
CHUNKS = (2**14, 2**15, 2**16, 2**17)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--device", default="cpu", help="where moetools' code is decoded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", nargs="+", choices=("codes", "chunks", "decoders"),
                        default=("codes", "chunks", "decoders"))  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    sources = synthetic(options.rows, options.columns)
    if options.model.exists():
        sources |= expert_matrices(options.model)
    if "codes" in options.tables:
        print_codes(sources, options.device)
    if "chunks" in options.tables:
        print_chunks(sources, options.device)
    if "decoders" in options.tables:
        print_decoders(sources, options.threads, options.device)


def print_codes(sources: dict[str, Tensor], device: str) -> None:
    """Bits and speed of every rounding of every source."""
    dictionary = qmoe_dictionary.build()
    print(
        "| weights | codes | zeros % | entropy | QMoE bits | moetools bits | QMoE decode Mw/s | moetools decode Mw/s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for source, weight_BOI in sources.items():
        for label, quantized in roundings(weight_BOI).items():
            print(f"| {source} | {label} | {row(quantized, dictionary, device)} |", flush=True)


def print_chunks(sources: dict[str, Tensor], device: str) -> None:
    """What chunks of other sizes cost and give."""
    print("\n| weights | weights of a chunk, about | bits | decode Mw/s |\n|---|---|---|---|")
    for source, weight_BOI in sources.items():
        quantized = EntropyGrid(rate=1.0).quantize(weight_BOI)
        for chunk in CHUNKS:
            with mock.patch("moetools.grids.entropy.CHUNK_WEIGHTS", chunk):
                bits, speed = measure_own(quantized, device)
            print(f"| {source} | {chunk} | {bits:.4f} | {speed:.1f} |", flush=True)


def synthetic(rows: int, columns: int) -> dict[str, Tensor]:
    """One matrix each."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(1, rows, columns, generator=generator)
    uniform = torch.rand(1, rows, columns, generator=generator) - 0.5
    laplace = -uniform.sign() * (1 - 2 * uniform.abs()).clamp(min=1e-9).log()
    return {f"Gaussian {rows} x {columns}": gaussian, f"Laplace {rows} x {columns}": laplace}


def expert_matrices(path: Path) -> dict[str, Tensor]:
    """The experts' matrices of a model, those of one shape as one batch."""
    checkpoint = open_checkpoint(path)
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, info in checkpoint.tensors.items():
        if ".experts." in name and len(info.shape) == 2:
            by_shape.setdefault(info.shape, []).append(name)
    return {
        f"{path.name} {len(names)} of {shape[0]} x {shape[1]}": torch.stack(
            [tensor.float() for tensor in checkpoint.read(names).values()]
        )
        for shape, names in by_shape.items()
    }


def roundings(weight_BOI: Tensor) -> dict[str, Quantized]:
    """The weights in codes, by what they are called in the table."""
    low, high = weight_BOI.amin(2, keepdim=True), weight_BOI.amax(2, keepdim=True)
    extremes = (weight_BOI > high / 2).to(torch.int8) - (weight_BOI < low / 2).to(torch.int8)
    threshold = weight_BOI.abs().flatten()[:: max(1, weight_BOI.numel() // 2**20)].quantile(0.885)
    sparse = torch.where(weight_BOI.abs() < threshold, 0.0, weight_BOI.sign()).to(torch.int8)
    found = {"ternary {min, 0, max}": ternary(extremes), "ternary, 88.5 % zeros": ternary(sparse)}
    for rate in RATES:
        found[f"entropy grid, {rate} bits"] = EntropyGrid(rate=rate).quantize(weight_BOI)
    return found


def ternary(codes_BOI: Tensor) -> Quantized:
    ones = torch.ones((len(codes_BOI), 1, 1)).expand(codes_BOI.shape)
    return Quantized(grid=EntropyGrid(levels=1), codes_BOI=codes_BOI, params=Params(scale_BOG=ones))


def row(quantized: Quantized, dictionary: qmoe_dictionary.Dictionary, device: str) -> str:
    """One line of the first table."""
    codes_BOI = quantized.codes_BOI
    entropy = sum(entropy_bits(codes_OI) for codes_OI in codes_BOI) / codes_BOI.numel()
    bits, speed = measure_own(quantized, device)
    theirs = ["", ""]
    if int(codes_BOI.abs().max()) <= 1:
        theirs = [f"{value:.3f}" for value in measure_dictionary(codes_BOI, dictionary)]
    zeros = 100 * float((codes_BOI == 0).double().mean())
    return f"{zeros:.1f} | {entropy:.4f} | {theirs[0]} | {bits:.4f} | {theirs[1]} | {speed:.2f}"


def entropy_bits(codes_OI: Tensor) -> float:
    """Codes times the entropy of their distribution."""
    _, count = codes_OI.unique(return_counts=True)
    return float(-(count * (count / count.sum()).log2()).sum())


def measure_own(quantized: Quantized, device: str) -> tuple[float, float]:
    """Bits per weight on disk, million weights decoded a second (all matrices together)."""
    packed = [(str(index), pack(str(index), quantized.matrix(index))) for index in range(len(quantized.codes_BOI))]
    total = sum(blob.numel() for _, tensors in packed for blob in tensors.values())
    moved = [(name, {key: blob.to(device) for key, blob in tensors.items()}) for name, tensors in packed]
    seconds, back = timed(lambda: unpack_many(moved))
    for index, one in enumerate(back):
        assert torch.equal(one.codes_BOI[0].cpu(), quantized.codes_BOI[index])
    weights = quantized.codes_BOI.numel()
    return 8 * total / weights, weights / seconds / 1e6


def print_decoders(sources: dict[str, Tensor], threads: int, device: str) -> None:
    """Million weights a second of every decoder, one after the other in this process."""
    print("\n| weights | bits (older layout) | decoder | Mw/s | times the older layout | Mw per CPU second | times |")
    print("|---|---|---|---|---|---|---|")
    for source, weight_BOI in sources.items():
        for rate in (0.5, 1.0, 2.0):
            quantized = EntropyGrid(rate=rate).quantize(weight_BOI)
            bits, first = sizes(quantized), None
            for label, (call, weights, count) in decoders(quantized, threads, device).items():
                torch.set_num_threads(count)
                speeds = [weights / seconds / 1e6 for seconds in (timed(call)[0], timed(call, time.process_time)[0])]
                torch.set_num_threads(1)
                first = first or speeds
                shown = " | ".join(f"{speed:.1f} | {speed / one:.1f}" for speed, one in zip(speeds, first, strict=True))
                print(f"| {source} | {bits} | {label} | {shown} |", flush=True)


def sizes(quantized: Quantized) -> str:
    """Bits per weight, and those in the older layout."""
    written = []
    for writer in (pack, lanes_writer.pack):
        blobs = [writer("w", quantized.matrix(index))["w_entropy"] for index in range(len(quantized.codes_BOI))]
        written.append(8 * sum(len(blob) for blob in blobs) / quantized.codes_BOI.numel())
    return f"{written[0]:.4f} ({written[1]:.4f})"


def decoders(quantized: Quantized, threads: int, device: str) -> dict[str, tuple[Callable[[], Any], int, int]]:
    """What is called, how many weights it decodes, with how many threads."""
    matrices = [quantized.matrix(index) for index in range(len(quantized.codes_BOI))]
    named = [(str(index), pack(str(index), matrix)) for index, matrix in enumerate(matrices)]
    older = [(str(index), lanes_writer.pack(str(index), matrix)) for index, matrix in enumerate(matrices)]
    some = matrices[0].rows(torch.arange(max(1, 2**16 // quantized.codes_BOI.shape[2])))
    small = chunks.parse("0", pack("0", some))
    bank, numbers = hold(named), [[number] for number in range(len(named))]
    plan = bank._plan(np.arange(len(named)))

    def reference() -> Tensor | None:
        return coder.decode_slowly(
            small.code, small.rows * small.columns, small.table_I, small.frequency_KA, small.steps
        )

    def older_dense() -> list[Tensor]:
        return [one.dequantize().bfloat16() for one in unpack_many(older)]

    found: dict[str, tuple[Callable[[], Any], int, int]] = {
        "older layout": (lambda: unpack_many(older), plan.weights, 1),
        "older layout, to bfloat16": (older_dense, plan.weights, 1),
        "reference": (reference, small.rows * small.columns, 1),
        "arrays": (lambda: with_arrays.decode(plan), plan.weights, 1),
    }
    if importlib.util.find_spec("numba"):
        module = importlib.import_module("moetools.formats.entropy.with_numba")
        for count in dict.fromkeys((1, threads)):
            found[f"numba, {count} threads"] = (lambda: module.decode(plan), plan.weights, count)
            found[f"numba, {count} threads, to bfloat16"] = (
                lambda: bank.dense(numbers, torch.bfloat16),
                plan.weights,
                count,
            )
    if device != "cpu":
        moved = bank.on({name: tensor.to(device) for name, tensor in bank.tensors.items()})

        def on_device(call: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: (call(), torch.accelerator.synchronize())

        found[f"{device}, as installed"] = (on_device(lambda: moved.codes(range(len(named)))), plan.weights, 1)
        found[f"{device}, to bfloat16"] = (on_device(lambda: moved.dense(numbers, torch.bfloat16)), plan.weights, 1)
    return found


def measure_dictionary(codes_BOI: Tensor, dictionary: qmoe_dictionary.Dictionary) -> tuple[float, float]:
    """The same for QMoE's code; rows of all matrices side by side."""
    codes_OI = codes_BOI.flatten(0, 1)
    words, _ = qmoe_dictionary.encode(codes_OI, dictionary)
    seconds, back = timed(lambda: qmoe_dictionary.decode(words, codes_OI.shape[1], dictionary))
    assert torch.equal(back, codes_OI)
    return qmoe_dictionary.bits(words, len(codes_OI)) / codes_OI.numel(), codes_OI.numel() / seconds / 1e6


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    """Best of three."""
    best, result = math.inf, None
    for _ in range(3):
        start = clock()
        result = call()
        best = min(best, clock() - start)
    return best, result


if __name__ == "__main__":
    main()
