"""Greedy continuations equal stock transformers' own, and what is counted in them equals counting by hand."""

import pytest
import torch
from streamed import open_model, token_batch, token_data

from moetools.forward.generate import (
    continuations,
    end_tokens,
    generation_metrics,
    generation_plan,
    loops,
    prompt_batches,
)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_continuations_are_those_of_stock_generate(family, tiny, stock):
    batches = [token_batch(3, 9, seed=1), token_batch(2, 9, seed=2)]
    model = open_model(tiny(family))
    found = continuations(model, batches, 12, generation_plan(model, batches, 12))
    for batch, ids_BN in zip(batches, found, strict=True):
        ids = batch.input_ids
        wanted = stock(tiny(family)).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12,
            do_sample=False, eos_token_id=None, pad_token_id=1,
        )  # fmt: skip
        assert torch.equal(ids_BN, wanted[:, 9:])


def test_what_ends_a_text_comes_from_the_config(tiny):
    assert end_tokens(open_model(tiny("mixtral"))) == {open_model(tiny("mixtral")).config["eos_token_id"]}


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([7] * 24, True),
        ([1, 2, 3, *[4, 5] * 12], True),
        ([4, 5] * 11 + [9, 4], False),
        (list(range(16)) * 3, False),
        ([*range(8)] * 3, True),
        ([1, 1], False),
        ([1, 1, 1], True),
        ([], False),
    ],
)
def test_loops(ids, expected):
    assert loops(ids) is expected


def test_metrics_are_those_of_counting_by_hand():
    end = 0
    reference = [torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 0, 9, 9, 9], [5, 5, 5, 5, 5, 5]])]
    found = [torch.tensor([[1, 2, 3, 9, 5, 6], [1, 2, 0, 4, 4, 4], [7, 7, 7, 7, 7, 7]])]
    metrics = generation_metrics(found, reference, {end})
    assert (metrics.prompts, metrics.tokens) == (3, 6)
    assert metrics.ended == pytest.approx(1 / 3)
    assert metrics.looping == pytest.approx(1 / 3)
    assert metrics.agreed == pytest.approx((3 / 6 + 2 / 2 + 0) / 3)
    assert metrics.same_start == pytest.approx(1 / 3)
    assert metrics.distinct == pytest.approx((1 + 1 + 1 / 3) / 3)
    alone = generation_metrics(found, None, {end})
    assert (alone.agreed, alone.same_start) == (None, None)


def test_prompts_are_beginnings_without_padding_of_every_task():
    first, padded, other = (
        token_batch(3, 20, seed=1),
        token_batch(2, 20, padding=(0, 15), seed=2),
        token_batch(4, 9, task=1),
    )
    batches = prompt_batches(token_data([first, padded, other]), prompts=2, length=8, batch_size=1)
    assert [batch.input_ids.shape for batch in batches] == [(1, 8)] * 4
    assert [int(batch.task[0]) for batch in batches] == [0, 0, 1, 1]
    assert torch.equal(batches[0].input_ids[0], first.input_ids[0, :8])
    assert prompt_batches(token_data([other], ("first", "second")), prompts=2, length=9, batch_size=4) == []
