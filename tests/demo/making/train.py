"""Trains the demo's tokenizer and model on the text of `prepare.py` and exports a checkpoint.

    python -m tests.demo.making.train --text TEXT --out DIR

A rerun with the same arguments goes on from the last saved step. On CPU with glibc,
`MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=16000000000` saves a quarter of the time.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moetools.forward.experts import use_experts
from tests.demo.making.measure import measure
from tests.demo.making.prepare import SOURCES

LOG = logging.getLogger(__name__)

# The split of the Qwen2 tokenizers: every digit is a token of its own, which arithmetic needs.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZER_CHARS = 1_800_000  # of each task
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a training run depends on; the same values give the same batches in the same order."""

    seed: int = 0
    steps: int = 2800
    warmup: int = 200
    decay: float = 0.4
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    window: int = 256
    #: windows of each task in every batch
    mix: tuple[tuple[str, int], ...] = (("code", 5), ("prose", 4), ("french", 3), ("arithmetic", 4))
    balance: float = 0.002
    z_loss: float = 1e-4
    vocabulary: int = 2048
    log_every: int = 100
    save_every: int = 300


def model_config(vocabulary: int) -> Qwen2MoeConfig:
    """The architecture of the demo: 3.8 million parameters; 4 of 16 experts and a shared one per token."""
    return Qwen2MoeConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        router_aux_loss_coef=0.001,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=1024,
        max_window_layers=4,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        use_cache=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def read_texts(path: Path) -> list[str]:
    """The texts of a .jsonl file."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def train_tokenizer(texts: dict[str, list[str]], vocabulary: int) -> Tokenizer:
    """A byte-level BPE from about as many characters of every task, so that none is left without tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sample = []
    for documents in texts.values():
        stride = max(1, sum(map(len, documents)) // TOKENIZER_CHARS)
        sample.extend(documents[::stride])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All documents as one row of token ids, token 0 before each."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids.append(0)
        ids.extend(encoding.ids)
    return torch.tensor(ids)


def pick_windows(stream: Tensor, first: int, count: int, window: int, seed: int) -> Tensor:
    """Windows number first .. first + count of an endless shuffled reading of the stream.

    Each pass over the stream shifts the window borders and visits the windows in a new order. The result
    depends on the arguments only, so a resumed run sees what an uninterrupted one would have.
    """
    per_pass = (len(stream) - 2 * window) // window
    rows = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number // per_pass)
        shift = int(torch.randint(window, (1,), generator=generator))
        start = shift + int(torch.randperm(per_pass, generator=generator)[number % per_pass]) * window
        rows.append(stream[start : start + window])
    return torch.stack(rows)


def make_batch(streams: dict[str, Tensor], step: int, config: TrainConfig) -> Tensor:
    """The windows [B, window] of one step: a fixed number of every task."""
    parts = [
        pick_windows(streams[task], step * count, count, config.window, config.seed + 100 + i)
        for i, (task, count) in enumerate(config.mix)
    ]
    return torch.cat(parts)


@contextmanager
def recorded_routing(model: Qwen2MoeForCausalLM) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects (router logits [T, E], chosen experts [T, K]) of every layer of the next forward pass."""
    seen: list[tuple[Tensor, Tensor]] = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    hooks = [gate.register_forward_hook(lambda _m, _i, out: seen.append((out[0], out[2]))) for gate in gates]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def router_losses(routing: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Balance loss E sum_e f_e p_e (Switch Transformer, eq. 4-6) and z-loss (ST-MoE, eq. 5), means over layers.

    f_e is the share of the batch's assignments that expert e got, p_e its mean router probability. Both are
    taken over the whole batch, which holds all tasks: an expert may serve one task only without being punished.
    """
    balance, z = [], []
    for logits, chosen in routing:
        experts = logits.shape[1]
        share = torch.bincount(chosen.reshape(-1), minlength=experts) / chosen.numel()
        balance.append(experts * (share * logits.float().softmax(-1).mean(0)).sum())
        z.append(logits.float().logsumexp(-1).square().mean())
    return torch.stack(balance).mean(), torch.stack(z).mean()


def next_token_loss(model: Qwen2MoeForCausalLM, batch: Tensor) -> Tensor:
    """Mean cross-entropy of every token but the first of each window, in nats.

    The vocabulary is projected a few rows at a time, so that the logits stay in the processor's cache.
    """
    hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
    total = hidden.new_zeros(())
    for h, targets in zip(hidden.split(2), batch[:, 1:].split(2), strict=True):
        logits = model.lm_head(h).flatten(0, 1)
        total = total + nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    return total / batch[:, 1:].numel()


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warmup, a constant rate, and a linear decay to zero over the last `decay` of the steps.

    So runs of different length are equal until the shorter one begins to decay, and `--steps` can still be
    changed when a saved run is taken up again before that.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    left = (config.steps - step) / (config.steps * config.decay)
    return config.learning_rate * min(1.0, left)


@torch.no_grad()
def validation_losses(model: Qwen2MoeForCausalLM, streams: dict[str, Tensor], window: int) -> dict[str, float]:
    """Mean loss in nats per task over the first 8 windows of each stream."""
    rows = {task: stream[: 8 * window].view(8, window) for task, stream in streams.items()}
    return {task: next_token_loss(model, batch).item() for task, batch in rows.items()}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; norms and biases are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def train_step(
    model: Qwen2MoeForCausalLM, optimizer: torch.optim.AdamW, batch: Tensor, step: int, config: TrainConfig
) -> dict[str, float]:
    """One update; returns the losses of the batch."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    with recorded_routing(model) as routing:
        loss = next_token_loss(model, batch)
    balance, z = router_losses(routing)
    (loss + config.balance * balance + config.z_loss * z).backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss.item(), "balance": balance.item(), "z": z.item()}


def train(
    model: Qwen2MoeForCausalLM,
    streams: dict[str, Tensor],
    validation: dict[str, Tensor],
    config: TrainConfig,
    checkpoint: Path,
) -> dict[str, Any]:
    """Trains the model in place, going on from `checkpoint` if that exists; returns the log."""
    optimizer = make_optimizer(model, config)
    first, seconds, curve = 0, 0.0, []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds, curve = saved["step"], saved["seconds"], saved["curve"]
    device = model.device
    started = time.monotonic()
    for step in range(first, config.steps):
        losses = train_step(model, optimizer, make_batch(streams, step, config).to(device), step, config)
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            held_out = validation_losses(model, validation, config.window)
            curve.append({"step": done} | {k: round(v, 4) for k, v in (losses | held_out).items()})
            elapsed = round(seconds + time.monotonic() - started)
            LOG.info(json.dumps(curve[-1] | {"seconds": elapsed}))
        if done % config.save_every == 0 or done == config.steps:
            spent = seconds + time.monotonic() - started
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            torch.save(state | {"seconds": spent, "curve": curve}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    spent = seconds + time.monotonic() - started
    tokens = config.steps * config.window * sum(count for _, count in config.mix)
    speed = round(tokens / spent)
    return {"tokens": tokens, "seconds": round(spent), "tokens_per_second": speed, "curve": curve}


def export(model: Qwen2MoeForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes the bf16 checkpoint as public Qwen2-MoE checkpoints are laid out, with its tokenizer.

    config.json names dtype, rope theta and window as those do, and has transformers 5's `rope_parameters` as well.
    """
    saved = model.to(torch.bfloat16)
    saved.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    saved.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    config = json.loads((directory / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["sliding_window"] = config["max_position_embeddings"]
    del config["layer_types"]
    write_json(directory / "config.json", config)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    # The name that transformers 5 writes is unknown to version 4; both know this one.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(directory / "tokenizer_config.json", {k: v for k, v in settings.items() if k != "backend"})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and export the demo's tokenizer and model.")
    parser.add_argument("--text", type=Path, required=True, help="what tests.demo.making.prepare wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--balance", type=float, default=TrainConfig.balance)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = TrainConfig(steps=args.steps, seed=args.seed, balance=args.balance)
    torch.set_num_threads(args.threads)
    torch.manual_seed(config.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = {task: read_texts(args.text / task / "train.jsonl") for task, _ in config.mix}
    tokenizer = train_tokenizer(texts, config.vocabulary)
    streams = {task: token_stream(tokenizer, documents) for task, documents in texts.items()}
    calibration = {task: read_texts(args.text / task / "calibration.jsonl") for task in texts}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    validation = {t: token_stream(tokenizer, documents).to(device) for t, documents in calibration.items()}
    model = Qwen2MoeForCausalLM(model_config(config.vocabulary)).to(device)
    use_experts(model)
    log = train(model, streams, validation, config, args.out / "checkpoint.pt")
    export(model.cpu(), tokenizer, args.out / "model")
    record = {
        "sources": SOURCES,
        "config": asdict(config),
        "train_tokens": {task: len(stream) for task, stream in streams.items()},
        "device": str(device),
        "training": log,
        "measured_on_test": measure(args.out / "model", args.text, list(texts)),
    }
    (args.out / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
