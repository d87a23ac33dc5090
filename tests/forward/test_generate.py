"""Continuations equal stock transformers' own, and what is counted in them equals counting by hand."""

import zlib
from dataclasses import replace

import pytest
import torch
from streamed import open_model, token_batch, token_data

from moetools.forward.generate import (
    Sampling,
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


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8, top_p=0.9, seed=3)])
def test_layer_by_layer_the_same_tokens_are_written_as_with_a_cache(family, sampling, tiny):
    batches = [token_batch(3, 9, seed=1), token_batch(2, 7, seed=2)]
    model = open_model(tiny(family))
    plan = generation_plan(model, batches, 10)
    assert plan.scratch > 0
    cached = continuations(model, batches, 10, plan, sampling=sampling)
    streamed = continuations(model, batches, 10, replace(plan, scratch=0), sampling=sampling)
    assert all(map(torch.equal, cached, streamed))


def test_a_budget_that_does_not_hold_all_layers_runs_them_one_by_one(tiny):
    batches = [token_batch(2, 9)]
    model = open_model(tiny("mixtral"))
    plan = generation_plan(model, batches, 4)
    model.memory_budget = plan.peak - 1
    small = generation_plan(model, batches, 4)
    assert (plan.scratch > 0, small.scratch) == (True, 0)
    assert torch.equal(continuations(model, batches, 4, plan)[0], continuations(model, batches, 4, small)[0])


def test_draws_have_the_frequencies_of_the_softmax(tiny):
    prompt, sampling = token_batch(1, 9), Sampling(temperature=1.3, top_p=0.6, seed=1)
    model = open_model(tiny("mixtral"))
    draws = [prompt] * 400
    found = torch.cat(continuations(model, draws, 1, generation_plan(model, draws, 1), sampling=sampling))[:, 0]
    with torch.inference_mode():
        _ = [model.stock.fill_layer(layer, model.stock.read_layer(layer)) for layer in range(model.num_layers)]
        probabilities = (model.stock.model(input_ids=prompt.input_ids).logits[0, -1].double() / 1.3).softmax(0)
    order = probabilities.argsort(descending=True)
    kept = order[: int((probabilities[order].cumsum(0) < 0.6).sum()) + 1]
    wanted = probabilities[kept] / probabilities[kept].sum()
    assert set(found.tolist()) <= set(kept.tolist())
    assert len(set(found.tolist())) > 10
    # Pearson: the statistic has about len(kept) - 1 as its mean and twice that as its variance.
    counts = torch.stack([(found == token).sum() for token in kept])
    statistic = float(((counts - 400 * wanted) ** 2 / (400 * wanted)).sum())
    assert abs(statistic - len(kept)) < 5 * (2 * len(kept)) ** 0.5


def test_draws_do_not_depend_on_batches(tiny):
    whole, sampling = token_batch(4, 9, seed=1), Sampling(seed=5)
    parts = [replace(whole, input_ids=ids, task=whole.task[:2]) for ids in whole.input_ids.split(2)]
    model = open_model(tiny("mixtral"))
    plan = generation_plan(model, [whole], 6)
    one, two = (continuations(model, batches, 6, plan, sampling=sampling) for batches in ([whole], parts))
    assert torch.equal(torch.cat(one), torch.cat(two))
    other = continuations(model, parts, 6, plan, sampling=replace(sampling, seed=6))
    assert not torch.equal(torch.cat(one), torch.cat(other))


def test_what_follows_an_end_is_not_written(tiny):
    batches = [token_batch(3, 9, seed=1)]
    model = open_model(tiny("mixtral"))
    plan = generation_plan(model, batches, 8)
    free = continuations(model, batches, 8, plan)
    end = int(free[0][0, 2])
    stopped = continuations(model, batches, 8, plan, end_ids={end})
    assert stopped[0].shape == (3, 8)
    for metrics in (generation_metrics(free, stopped, {end}), generation_metrics(stopped, free, {end})):
        assert metrics.agreed == metrics.same_start == 1
        assert metrics.ended >= 1 / 3


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
    assert metrics.length == pytest.approx((6 + 2 + 6) / 3)
    rows = [bytes([1, 2, 3, 9, 5, 6]), bytes([1, 2]), bytes([7] * 6)]
    assert metrics.compression == pytest.approx(sum(len(row) / len(zlib.compress(row, 9)) for row in rows) / 3)
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
