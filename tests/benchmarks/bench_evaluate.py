"""Time of evaluating a model pair with exact KL, as a ratio to one plain stock-transformers pass over the same tokens.

Target: at most 2.3. Prints wall-clock and CPU-time ratios, medians over interleaved rounds.

    python tests/benchmarks/bench_evaluate.py [MODEL] [TOKENS.safetensors]
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from moetools.checkpoint.reader import open_checkpoint
from moetools.forward.evaluate import compare
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.text.tokens import TokenBatch, TokenData

SHARED = Path(__file__).parents[2].parent / "shared"
ROUNDS, BATCH, TARGET = 3, 8, 2.3


def token_data(file: Path) -> TokenData:
    ids = load_file(file)["input_ids"].long()
    batches = tuple(
        TokenBatch(input_ids=part, attention_mask=None, task=torch.zeros(len(part), dtype=torch.int64))
        for part in ids.split(BATCH)
    )
    return TokenData(tasks=("all",), batches=batches, fingerprint="", seq_len=ids.shape[1])


def timed(run: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def main(model: Path, tokens: Path) -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(2)
    once = token_data(tokens)
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    # The pair is opened and read from disk in every round, the plain model is not: a fixed cost beside the tokens'.
    for repeats in (1, 4):
        measure(stock, model, dataclasses.replace(once, batches=once.batches * repeats))


def measure(stock: Any, model: Path, data: TokenData) -> None:
    checkpoint, options = open_checkpoint(model), ForwardOptions(device="cpu")

    def plain() -> None:
        with torch.inference_mode():
            for batch in data.batches:
                stock(input_ids=batch.input_ids, use_cache=False)

    def pair() -> None:
        compare(StreamedModel(checkpoint, options), {"same": StreamedModel(checkpoint, options)}, data)

    plain(), pair()
    rounds = [(timed(plain), timed(pair)) for _ in range(ROUNDS)]
    print(f"{data.num_tokens} tokens, {torch.get_num_threads()} threads, {ROUNDS} rounds, target {TARGET}")
    for index, name in enumerate(("wall", "cpu")):
        plains, pairs = ([one[side][index] for one in rounds] for side in (0, 1))
        ratio = statistics.median(pair / plain for plain, pair in zip(plains, pairs, strict=True))
        print(
            f"{name:>5}: plain {statistics.median(plains):.2f} s, evaluated pair {statistics.median(pairs):.2f} s,"
            f" ratio {ratio:.2f} (of the best rounds: {min(pairs) / min(plains):.2f})"
        )


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    defaults = [SHARED / "models" / "mixtral-8x9m", SHARED / "data" / "calibration.safetensors"]
    main(*(given + defaults[len(given) :]))
