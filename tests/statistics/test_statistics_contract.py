"""What every statistic must obey, run over all files found in the package."""

from typing import get_args

import pytest
import torch

from moetools.plugins import load_plugin, plugin_names
from moetools.statistics.base import Reads

CPU = torch.device("cpu")
NAMES = plugin_names("moetools.statistics")


@pytest.fixture(params=NAMES)
def statistic(request):
    return load_plugin("moetools.statistics", request.param, kind="statistic").STATISTIC


def stream(statistic, case, batches):
    state = statistic.init(case.shape, CPU)
    for batch in batches:
        statistic.update(state, batch)
    return state


def pieces(statistic, case, *bounds, order=None):
    """The batch in pieces that begin at `bounds`; sequences are left whole where they must be."""
    if statistic.whole_sequences:
        rows = torch.arange(len(case.task_T)) if order is None else order
        return [case.batch(order=rows[case.task_T[rows] == task]) for task in range(case.shape.num_tasks)]
    ends = [*bounds[1:], len(case.task_T)]
    return [case.batch(slice(start, end), order) for start, end in zip(bounds, ends, strict=True)]


def assert_same(left, right, **close):
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], msg=lambda text, key=key: f"{key}: {text}", **close)


def clone(state):
    return {key: value.clone() for key, value in state.items()}


def test_the_package_holds_the_statistics_methods_need():
    assert {"load", "router", "coactivation", "reap", "ean", "mean-output", "max-activation"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_name_is_the_file_name(name):
    assert load_plugin("moetools.statistics", name, kind="statistic").STATISTIC.name == name.replace("-", "_")


def test_every_accumulator_has_a_reduction(statistic, make_case):
    state = statistic.init(make_case().shape, CPU)
    assert state.keys() == statistic.reductions.keys()
    assert set(statistic.reductions.values()) <= {"sum", "max"}
    assert statistic.reads <= set(get_args(Reads))


def test_sums_are_held_in_fp64_or_int64(statistic, make_case):
    state = statistic.init(make_case().shape, CPU)
    summed = [state[key].dtype for key, how in statistic.reductions.items() if how == "sum"]
    assert all(dtype in (torch.float64, torch.int64) for dtype in summed)


def test_update_is_in_place_and_changes_something(statistic, make_case):
    case = make_case()
    state = statistic.init(case.shape, CPU)
    before, held = clone(state), dict(state)
    statistic.update(state, case.batch())
    assert all(state[key] is held[key] for key in held)
    assert any(not torch.equal(state[key], before[key]) for key in before)


def test_merge_of_split_streams_equals_the_whole(statistic, make_case):
    case = make_case(tokens=60, unused=(1,))
    whole = stream(statistic, case, [case.batch()])
    *some, last = pieces(statistic, case, 0, 7, 20)
    left, right = stream(statistic, case, some), stream(statistic, case, [last])
    untouched = clone(left)
    assert_same(statistic.merge(left, right), whole, rtol=1e-5, atol=1e-5)
    assert_same(statistic.merge(right, left), statistic.merge(left, right), rtol=1e-12, atol=0)
    assert_same(left, untouched, rtol=0, atol=0)


def test_merge_with_an_empty_stream_changes_nothing(statistic, make_case):
    case = make_case()
    state = stream(statistic, case, [case.batch()])
    assert_same(statistic.merge(statistic.init(case.shape, CPU), state), state, rtol=0, atol=0)


def test_order_of_tokens_does_not_matter(statistic, make_case):
    case = make_case(tokens=60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    shuffled = stream(statistic, case, pieces(statistic, case, 0, 31, order=order))
    assert_same(shuffled, stream(statistic, case, [case.batch()]), rtol=1e-5, atol=1e-5)


def test_an_empty_batch_changes_nothing(statistic, make_case):
    case = make_case()
    state = stream(statistic, case, [case.batch()])
    before = clone(state)
    statistic.update(state, case.batch(slice(0, 0)))
    assert_same(state, before, rtol=0, atol=0)


def test_update_leaves_the_batch_alone(statistic, make_case):
    case, twin = make_case(), make_case()
    batch = case.batch()
    statistic.update(statistic.init(case.shape, CPU), batch)
    fresh = twin.batch()
    for name in ("hidden_TD", "router_logits_TE", "topk_index_TK", "topk_weight_TK", "task_T"):
        assert torch.equal(getattr(batch, name), getattr(fresh, name))
    for name in ("token_S", "expert_S", "weight_S", "counts_E", "output_SD"):
        assert torch.equal(getattr(batch.slots, name), getattr(fresh.slots, name))


def test_finalize_does_not_mutate_and_is_finite(statistic, make_case):
    case = make_case(unused=(0,))
    for state in (statistic.init(case.shape, CPU), stream(statistic, case, [case.batch()])):
        before = clone(state)
        final = statistic.finalize(state)
        assert_same(state, before, rtol=0, atol=0)
        assert final is not state
        assert all(value.isfinite().all() for value in final.values())


def test_finalized_quantities_of_all_tasks_do_not_depend_on_batching(statistic, make_case):
    case = make_case(tokens=64, tasks=2)
    parts = pieces(statistic, case, 0, 16, 32, 48)
    split, whole = stream(statistic, case, parts), stream(statistic, case, [case.batch()])
    assert_same(statistic.finalize(split), statistic.finalize(whole), rtol=1e-5, atol=1e-5)
