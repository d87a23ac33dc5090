"""Measures the trained demo: perplexity, specialization of routing, the cost of losing experts, choices.

It runs the checkpoint with stock transformers and nothing of moetools, so that its figures are a reference
for the rest of the package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

WINDOW = 256
SHUFFLES = 50
BATCH = 16


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def windows(tokenizer: Any, texts: list[str], size: int = WINDOW) -> Tensor:
    """All documents in a row, token 0 before each, as whole windows [N, size]; what is left over is dropped."""
    ids = [i for text in texts for i in (0, *tokenizer(text, add_special_tokens=False).input_ids)]
    count = len(ids) // size
    return torch.tensor(ids[: count * size]).view(count, size)


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Natural log of the probability of every next token [N, window - 1, V], in fp32."""
    return model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def mean_loss(model: PreTrainedModel, rows: Tensor) -> float:
    """Mean negative log-likelihood in nats of every token but the first of each window."""
    total = 0.0
    for batch in rows.split(BATCH):
        total -= log_probabilities(model, batch).gather(2, batch[:, 1:, None]).double().sum().item()
    return total / rows[:, 1:].numel()


@torch.no_grad()
def expert_counts(model: PreTrainedModel, rows: Tensor, layers: int, experts: int) -> Tensor:
    """How often each window of rows sends a token to each expert: [L, N, E], float64."""
    chosen: list[list[Tensor]] = [[] for _ in range(layers)]
    gates = [layer.mlp.gate for layer in model.model.layers]
    hooks = [
        gate.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out[2]))
        for gate, kept in zip(gates, chosen, strict=True)
    ]
    try:
        for batch in rows.split(BATCH):
            model.model(input_ids=batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    flat = [torch.cat(kept).view(len(rows), -1) for kept in chosen]
    return torch.stack([nn.functional.one_hot(layer, experts).sum(1).double() for layer in flat])


def mutual_information(counts_NE: Tensor, labels_N: Tensor) -> float:
    """I(task; expert) = sum p(t, e) log2(p(t, e) / (p(t) p(e))) in bits, from counts per window."""
    tasks = int(labels_N.max()) + 1
    joint = torch.zeros(tasks, counts_NE.shape[1], dtype=torch.float64).index_add_(0, labels_N, counts_NE)
    joint /= joint.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return torch.where(joint > 0, joint * (joint / independent).log2(), 0.0).sum().item()


def specialization(counts_LNE: Tensor, labels_N: Tensor) -> list[dict[str, float]]:
    """Per layer the mutual information of task and expert, and what is left when tasks are shuffled.

    The tasks of whole windows are shuffled: the tokens of a window are alike, so that a null made by shuffling
    those of single tokens would be too low.
    """
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(labels_N), generator=generator) for _ in range(SHUFFLES)]
    found = []
    for counts in counts_LNE:
        null = [mutual_information(counts, labels_N[order]) for order in orders]
        bits = {"bits": mutual_information(counts, labels_N), "null_mean": sum(null) / SHUFFLES, "null_max": max(null)}
        found.append({name: round(value, 4) for name, value in bits.items()})
    return found


@contextmanager
def without_experts(model: PreTrainedModel, dropped: list[Tensor]) -> Iterator[None]:
    """Routes as if the given experts of each layer were not there: the softmax goes over the others only."""

    def gate_hook(ids: Tensor) -> Any:
        def masked(module: Any, _inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            logits = output[0].index_fill(1, ids, float("-inf"))
            weights, chosen = logits.float().softmax(-1).topk(module.top_k)
            return logits, weights.to(logits.dtype), chosen

        return masked

    gates = [layer.mlp.gate for layer in model.model.layers]
    hooks = [gate.register_forward_hook(gate_hook(ids)) for gate, ids in zip(gates, dropped, strict=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def divergence(model: PreTrainedModel, rows: Tensor, dropped: list[Tensor]) -> float:
    """Mean KL(whole model || model without the dropped experts) per token, in nats."""
    total = 0.0
    for batch in rows.split(BATCH):
        whole = log_probabilities(model, batch)
        with without_experts(model, dropped):
            less = log_probabilities(model, batch)
        total += (whole.exp() * (whole - less)).sum().item()
    return total / rows[:, 1:].numel()


def choice_accuracy(model: PreTrainedModel, tokenizer: Any, items: list[dict[str, Any]]) -> float:
    """Share of items whose right choice has the highest log-likelihood per byte after the prompt."""
    right = 0
    for item in items:
        prompt = [0, *tokenizer(item["prompt"], add_special_tokens=False).input_ids]
        endings = [tokenizer(choice, add_special_tokens=False).input_ids for choice in item["choices"]]
        length = len(prompt) + max(map(len, endings))
        rows = torch.tensor([(prompt + ending + [0] * length)[:length] for ending in endings])
        tokens = log_probabilities(model, rows).gather(2, rows[:, 1:, None])[..., 0]
        scores = [
            tokens[i, len(prompt) - 1 : len(prompt) + len(ending) - 1].sum().item() / len(choice.encode())
            for i, (ending, choice) in enumerate(zip(endings, item["choices"], strict=True))
        ]
        right += scores.index(max(scores)) == item["answer"]
    return right / len(items)


def measure(model_path: Path, data: Path, tasks: list[str]) -> dict[str, Any]:
    """All figures of a checkpoint on DATA/<task>/test.jsonl and DATA/choice/<task>.jsonl."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    rows = {t: windows(tokenizer, [r["text"] for r in read_rows(data / t / "test.jsonl")]) for t in tasks}
    losses = {task: mean_loss(model, rows[task]) for task in tasks}
    config = model.config
    by_task = [expert_counts(model, rows[t], config.num_hidden_layers, config.num_experts) for t in tasks]
    labels = torch.cat([torch.full((len(rows[task]),), i) for i, task in enumerate(tasks)])
    counts = torch.cat(by_task, dim=1)
    usage_LE = counts.sum(1)
    least_used = list(usage_LE.argsort(1)[:, : config.num_experts // 2])
    with without_experts(model, least_used):
        pruned = {task: mean_loss(model, rows[task]) for task in tasks}
    return {
        "test_windows": {task: len(rows[task]) for task in tasks},
        "perplexity": {task: round(math.exp(losses[task]), 3) for task in tasks},
        "specialization_bits": specialization(counts, labels),
        "expert_share_per_task": {
            task: [[round(x, 3) for x in layer.tolist()] for layer in c.sum(1) / c.sum((1, 2))[:, None]]
            for task, c in zip(tasks, by_task, strict=True)
        },
        "without_least_used_half": {
            "dropped": [sorted(ids.tolist()) for ids in least_used],
            "share_of_tokens": [
                round((usage_LE[i, ids].sum() / usage_LE[i].sum()).item(), 3) for i, ids in enumerate(least_used)
            ],
            "perplexity": {task: round(math.exp(pruned[task]), 3) for task in tasks},
            "kl_nats": {task: round(divergence(model, rows[task], least_used), 4) for task in tasks},
        },
        "choice_accuracy": {
            task: choice_accuracy(model, tokenizer, read_rows(data / "choice" / f"{task}.jsonl")) for task in tasks
        },
    }
