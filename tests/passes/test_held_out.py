"""Which tokens are held out, how many a router is fitted to, and how its choices are compared."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import UserError
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.methods.prune.reap import METHOD as REAP
from moetools.passes.recipe_checks import check_held_out, scarce_text
from moetools.passes.recipes import recipe_for
from moetools.passes.sequential import SequentialLayer, SequentialPass
from moetools.passes.two_streams import TokenSample, sampled_tokens, streams_plan
from moetools.text.tokens import TokenBatch, TokenData

CPU = ForwardOptions(device="cpu")


def ragged(*sizes: int, length: int = 4) -> TokenData:
    """Batches of so many sequences."""
    generator = torch.Generator().manual_seed(3)
    batches = tuple(
        TokenBatch(
            input_ids=torch.randint(2, 128, (size, length), generator=generator),
            attention_mask=None,
            task=torch.zeros(size, dtype=torch.int64),
        )
        for size in sizes
    )
    return TokenData(tasks=("t",), batches=batches, fingerprint="x", seq_len=length)


def sequential(path: Path, data: TokenData, keep: int = 8) -> SequentialPass:
    checkpoint = open_checkpoint(path)
    original = StreamedModel(checkpoint, CPU)
    config = original.arch.with_expert_count(checkpoint.config, keep)
    smaller = StreamedModel(checkpoint, CPU, config=config)
    return SequentialPass(original, smaller, data, (), streams_plan(original, smaller, data, (), sample_tokens=64))


def test_every_seventh_sequence_of_the_data_is_held_out_whatever_the_batches(tiny: Callable[..., Path]) -> None:
    run = sequential(tiny("mixtral"), ragged(5, 5, 2, 5, 4))
    held = torch.cat([run.rows(number, True).view(-1, 4)[:, 0] for number in range(5)])
    assert held.nonzero()[:, 0].tolist() == [6, 13, 20]
    train = torch.cat([run.rows(number, False).view(-1, 4)[:, 0] for number in range(5)])
    assert torch.equal(train, ~held)


def test_text_with_a_seventh_sequence_in_its_short_last_batch_is_enough() -> None:
    check_held_out(ragged(4, 3), "the refit")
    with pytest.raises(
        UserError, match="the refit chooses its ridge on every 7th sequence, and 6 sequences are too few"
    ):
        check_held_out(ragged(4, 2), "the refit")


@pytest.mark.parametrize("tokens", [5, 8, 15, 16, 23, 1000])
def test_a_sample_has_the_tokens_it_is_said_to_have(tokens: int) -> None:
    sample = TokenSample(8, tokens)
    for part in torch.arange(tokens).split(3):
        sample.add(part[:, None], part[:, None])
    assert len(sample.result()[0]) == sampled_tokens(8, tokens)


@pytest.mark.parametrize(
    ("tokens", "width", "said"),
    [
        (900, 1000, ["1,000 numbers per router row from 900 tokens; more text"]),
        (1100, 1000, []),
        (17000, 8192, []),
        (1_000_000, 20_000, ["20,000 numbers per router row from a sample of 8,197 tokens"]),
    ],
)
def test_router_rows_are_compared_with_the_tokens_they_are_fitted_to(tokens: int, width: int, said: list[str]) -> None:
    recipe = recipe_for(REAP, {"router": "fitted"})
    found = scarce_text([recipe], tokens, columns=1, hidden_size=width)
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True))


def first_layer(run: SequentialPass) -> SequentialLayer:
    return next(layer for layer in run.layers() if isinstance(layer, SequentialLayer))


def grouped_choice(logits_NE: Tensor, bias_E: Tensor) -> Tensor:
    """DeepSeek-V3's rule, 2 groups of which the best one by its two largest scores stays, 3 experts of it."""
    score = logits_NE.sigmoid() + bias_E
    group = score.unflatten(1, (2, -1)).topk(2).values.sum(-1).argmax(1)
    inside = torch.arange(logits_NE.shape[1]) // (logits_NE.shape[1] // 2) == group[:, None]
    return score.masked_fill(~inside, -torch.inf).topk(3).indices


def test_choices_are_compared_by_the_rule_of_the_family(tiny: Callable[..., Path]) -> None:
    """Groups and correction biases decide: the same logits without them choose other experts."""
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode():
        layer = first_layer(sequential(tiny("deepseek_v3"), ragged(6, 6, length=12)))
        bias = 0.3 * torch.randn(8, generator=generator)
        weights = replace(layer.weights, correction_bias_E=bias)
        own = layer.hidden_ND @ weights.router_ED.float().T
        exact = own + 0.5 * torch.randn(own.shape, generator=generator)
        chosen, wanted = grouped_choice(own, bias), grouped_choice(exact, bias)
        shared = (chosen[:, :, None] == wanted[:, None]).any(2).float().mean().item()
        plain = (own.topk(3).indices[:, :, None] == exact.topk(3).indices[:, None]).any(2).float().mean().item()
        assert shared != pytest.approx(plain, abs=0.02)
        assert layer.router_agreement(weights, exact) == pytest.approx(shared)
        assert layer.router_agreement(weights, own) == 1.0


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "phimoe", "minimax_m2", "granitemoe", "ernie4_5_moe"])
def test_a_router_agrees_with_its_own_logits_and_not_with_others(family: str, tiny: Callable[..., Path]) -> None:
    with torch.inference_mode():
        layer = first_layer(sequential(tiny(family), ragged(6, 6, length=12)))
        assert layer.router_agreement(layer.weights, layer.logits_NE) == pytest.approx(1.0, abs=0.01)
        assert layer.router_agreement(layer.weights, -layer.logits_NE) < 0.6
