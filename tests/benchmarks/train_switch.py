"""A tiny Switch Transformer, trained for a few minutes on the embedded model's prose and French as span corruption.

`python tests/benchmarks/train_switch.py OUT [MINUTES]` writes OUT/model, OUT/half (the same after half of the time) and
OUT/TASK.jsonl, prompts with completions of text that was not trained on, and tells the loss in stock transformers.
"""

import json
import random
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from moetools.demo import install_demo

_TASKS = ("prose", "french")
_WORDS, _SPAN, _SPANS = 48, 3, 3
"""Words of a window, of a span that is cut out, and spans of a window."""
_ROWS, _HELD_OUT = 16, 100
_SIZES = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 4}
_EXPERTS = {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_experts": 8, "expert_capacity": 16}

Pair = tuple[list[int], list[int]]


def corrupted(words: list[str], rng: random.Random) -> dict[str, str]:
    """A window whose spans are numbered gaps, and what was in the gaps."""
    starts = sorted(rng.sample(range(0, len(words) - _SPAN, 2 * _SPAN), _SPANS))
    prompt, completion, at = [], [], 0
    for number, start in enumerate(starts, 1):
        prompt += [*words[at:start], f"<{number}>"]
        completion += [f"<{number}>", *words[start : start + _SPAN]]
        at = start + _SPAN
    return {"prompt": " ".join([*prompt, *words[at:]]), "completion": " ".join(completion)}


def words_of(file: Path) -> list[str]:
    """All words of a .jsonl of texts."""
    return " ".join(json.loads(line)["text"] for line in file.read_text().splitlines()).split()


def batch_of(pairs: list[Pair]) -> dict[str, Tensor]:
    prompts, labels = zip(*pairs, strict=True)
    return {
        "input_ids": pad_sequence([torch.tensor(one) for one in prompts], batch_first=True, padding_value=1),
        "attention_mask": pad_sequence([torch.ones(len(one)).long() for one in prompts], batch_first=True),
        "labels": pad_sequence([torch.tensor(one) for one in labels], batch_first=True, padding_value=-100),
    }


def train(model: SwitchTransformersForConditionalGeneration, draw: list, minutes: float, out: Path) -> int:
    """Steps that were made in the time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    start, steps, halved = time.monotonic(), 0, False
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
        if share > 0.5 and not halved:
            model.save_pretrained(out / "half")
            halved = True
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (steps + 1) / 50) * (1 - 0.9 * share)
        loss = model.train()(**batch_of([one() for one in draw for _ in range(_ROWS // len(draw))])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps % 100 == 0:
            print(f"step {steps}: loss {loss.item():.3f}", flush=True)
    return steps


def held_out_loss(model: SwitchTransformersForConditionalGeneration, pairs: list[Pair]) -> float:
    """Nats per token, one pair at a time."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for pair in pairs:
            total += model.eval()(**batch_of([pair])).loss.item() * len(pair[1])
            tokens += len(pair[1])
    return total / tokens


def main(out: Path, minutes: float) -> None:
    """Text, training, what is held out."""
    demo, rng = install_demo(out / "demo"), random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    ids = {"vocab_size": len(tokenizer), "decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 0}
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**_SIZES, **_EXPERTS, **ids))

    def encoded(record: dict[str, str]) -> Pair:
        return tuple([*tokenizer(record[key], add_special_tokens=False).input_ids, 0] for key in record)  # type: ignore[return-value]

    draw, held = [], {}
    for task in _TASKS:
        kept, rest = (words_of(demo.data / task / f"{part}.jsonl") for part in ("calibration", "test"))

        def one(kept: list[str] = kept) -> Pair:
            start = rng.randrange(len(kept) - _WORDS)
            return encoded(corrupted(kept[start : start + _WORDS], rng))

        draw.append(one)
        starts = range(0, len(rest) - _WORDS, _WORDS)
        held[task] = [corrupted(rest[start : start + _WORDS], rng) for start in starts][:_HELD_OUT]
        (out / f"{task}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in held[task]))
    steps = train(model, draw, minutes, out)
    model.save_pretrained(out / "model")
    for name in ("model", "half"):
        tokenizer.save_pretrained(out / name)
    losses = {task: held_out_loss(model, [encoded(one) for one in records]) for task, records in held.items()}
    print(f"{model.num_parameters():,} parameters, {steps} steps; held out, stock transformers: {losses}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 4)
