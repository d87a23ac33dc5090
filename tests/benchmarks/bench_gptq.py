"""GPTQ of one layer's experts, all at once against one after the other: `python tests/benchmarks/bench_gptq.py`.

Prints one Markdown row per shape: seconds of the batched solver and of the same solver called once per expert, without
and with refinement, on two CPU threads and, where there is one, on the GPU. Weights and inputs are random.
"""

import time
from collections.abc import Callable

import torch

from moetools.grids.integer import Integer
from moetools.methods.quantize.base import Inputs
from moetools.methods.quantize.gptq import Gptq

SHAPES = [(8, 768, 192), (8, 192, 384), (16, 128, 64), (64, 512, 256), (128, 256, 256), (32, 1024, 1024)]
PLAIN = Gptq(sweeps=0)


def main() -> None:
    torch.set_num_threads(2)
    print(
        "| experts x rows x columns | device | plain: batched s | one by one s | ratio | refined: batched s "
        "| one by one s | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for experts, rows, columns in SHAPES:
        for device in devices:
            weight, inputs = problem(experts, rows, columns, device)
            cells = []
            for method in (PLAIN, Gptq()):
                together = seconds(lambda: method.quantize(weight, GRID, inputs), device)  # noqa: B023
                apart = seconds(lambda: one_by_one(method, weight, inputs), device)  # noqa: B023
                cells += [f"{together:.3f}", f"{apart:.3f}", f"{apart / together:.1f}"]
            print(f"| {experts} x {rows} x {columns} | {device} | {' | '.join(cells)} |")


GRID = Integer(bits=4, group_size=64)


def problem(experts: int, rows: int, columns: int, device: str) -> tuple[torch.Tensor, Inputs]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(experts, rows, columns, generator=generator)
    samples = torch.randn(experts, 2 * columns, columns, generator=generator)
    hessian = samples.mT @ samples / samples.shape[1]
    count = torch.full((experts,), samples.shape[1])
    return weight.to(device), Inputs(hessian_BII=hessian.to(device), count_B=count.to(device))


def one_by_one(method: Gptq, weight: torch.Tensor, inputs: Inputs) -> None:
    for number in range(len(weight)):
        some = slice(number, number + 1)
        method.quantize(weight[some], GRID, inputs.matrices(some))


def seconds(work: Callable[[], object], device: str) -> float:
    """The least of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
