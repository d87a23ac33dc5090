"""Advice against numbers written out by hand, on made-up routings."""

import random

import pytest
import torch
from torch import Tensor

from moetools.forward.calibrate import ModelStatistics, Provenance, load_statistic
from moetools.statistics.base import LayerShape
from moetools.verbs.inspect.left_out import left_out
from moetools.verbs.inspect.routing import NEEDS
from moetools.verbs.inspect.routing_report import RoutingReport, routing_report


def report_of(
    slots: list[Tensor], task_S: Tensor, *, top_k: int = 1, groups: int = 1, names: str = "abcdef"
) -> RoutingReport:
    """Of layers 1, 2, ... with these slots [S, E] per sequence."""
    experts, tasks = slots[0].shape[1], int(task_S.max()) + 1
    shape = LayerShape(
        num_experts=experts, top_k=top_k, hidden_size=4, expert_size=4, num_tasks=tasks, num_sequences=len(task_S)
    )
    layers = {}
    for index, slots_SE in enumerate(slots, start=1):
        states = {name: load_statistic(name).init(shape, torch.device("cpu")) for name in NEEDS}
        load_GE = torch.zeros(tasks, experts).long().index_add_(0, task_S, slots_SE)
        states["load"] = {"slots": load_GE, "tokens": load_GE.sum(1) // top_k}
        states["sequence_load"] = {"slots": slots_SE, "task": task_S}
        layers[index] = states
    provenance = Provenance(model="m", data="d", tasks=tuple(names[:tasks]), dtype="float32", num_tokens=1)
    return routing_report(ModelStatistics(provenance=provenance, shape=shape, layers=layers), "m", groups=groups)


def said(report: RoutingReport, about: str) -> list[str]:
    return [one.text for one in report.advice if one.about == about]


def test_left_out_is_the_share_of_the_other_experts_on_the_other_half() -> None:
    random.seed(4)
    slots = [[[random.randint(0, 9) for _ in range(5)] for _ in range(31)] for _ in range(2)]
    task = [0] * 16 + [1] * 15
    states = [{"slots": torch.tensor(layer), "task": torch.tensor(task)} for layer in slots]
    for only in (None, 0):
        mine = [[s for s in range(31) if task[s] == one] for one in (0, 1)][: 2 if only is None else 1]
        if only == 0:
            assert left_out(states, seed=0, task=0) is None, "eight sequences to judge on"
            continue
        first, second = ([s for rows in mine for s in rows[start::2]] for start in (0, 1))
        found = left_out(states, seed=0, task=only)
        assert found is not None
        assert found.sequences == len(second) == 15
        for kept in range(1, 6):
            shares = []
            for place, layer in enumerate(slots):
                order = sorted(range(5), key=lambda e, layer=layer: -sum(layer[s][e] for s in first))
                whole = sum(sum(layer[s]) for s in second)
                shares.append(1 - sum(layer[s][e] for s in second for e in order[:kept]) / whole)
                one = found.of_layer(place, kept)
                assert one.value == pytest.approx(shares[-1], abs=1e-12)
                assert one.low <= one.value <= one.high
            assert found.of(kept).value == pytest.approx(sum(shares) / 2, abs=1e-12)


def test_the_interval_is_that_of_means_over_sequences() -> None:
    """Sequences of equal length: the share left out is a mean over them, with the textbook's standard error."""
    generator = torch.Generator().manual_seed(1)
    other_S = torch.randint(0, 50, (400,), generator=generator)
    slots_SE = torch.stack([100 - other_S, other_S], 1)
    found = left_out([{"slots": slots_SE, "task": torch.zeros(400).long()}], seed=0)
    assert found is not None
    judged_S = other_S[1::2].double() / 100
    half = 1.96 * float(judged_S.std()) / 200**0.5
    one = found.of(1)
    assert one.value == pytest.approx(float(judged_S.mean()))
    assert one.high - one.value == pytest.approx(half, rel=0.25)
    assert one.value - one.low == pytest.approx(half, rel=0.25)


def test_dead_weak_and_shared_experts_are_named() -> None:
    slots_SE = torch.tensor([[90, 20, 8, 2, 0, 0, 0, 0]]).expand(40, 8).contiguous()
    even_SE = torch.full((40, 8), 15)
    report = report_of([even_SE, slots_SE], torch.zeros(40).long())
    unusual = said(report, "unusual")
    assert unusual[0].startswith(
        "4 of 16 experts got no token (layer 2: 4 5 6 7); with 95 % confidence fewer than 7.5%"
    )
    assert unusual[1] == "1 of 16 experts get tokens, but less than 25% of the even share (layer 2: 3)."
    assert not any("collapsed" in text for text in unusual), "2.3 effective experts"
    shared = torch.tensor([[34, 6, 0, 0]]).expand(40, 4)
    report = report_of([shared.contiguous()], torch.zeros(40).long())
    assert any("act like shared ones (layer 1: 0)" in text for text in said(report, "unusual"))
    few = torch.tensor([[100, 2, 2, 2, 2, 2, 2, 2]]).expand(40, 8).contiguous()
    report = report_of([few], torch.zeros(40).long())
    assert "Layer 1: collapsed, fewer than 2 effective experts of 8 (1.8 in layer 1)." in said(report, "unusual")
    assert said(report, "unusual")[-1] == "Tasks whose median of effective experts is below 2 of 8: a 1.8."


def test_nothing_unusual_about_an_even_load() -> None:
    report = report_of([torch.full((40, 8), 15)] * 2, torch.arange(40) % 2)
    assert said(report, "unusual") == said(report, "leave alone") == []
    assert said(report, "merge or prune")[0].startswith("No expert is spare: 7 of 8 leave out 12.5%")
    assert "4 leave out 50.0% (95 %: 50.0% to 50.0%), 50% if all" in said(report, "merge or prune")[0]
    assert said(report, "route-tasks")[0].startswith("It would pay for no task: the best, a, leaves out 50.0%")


def test_counts_that_the_model_allows() -> None:
    slots_SE = torch.tensor([[50, 49, 48, 1, 0, 0, 0, 0]]).expand(40, 8).contiguous()
    one = said(report_of([slots_SE], torch.zeros(40).long()), "merge or prune")[0]
    assert one.startswith("3 of 8 experts per layer leave out 0.7%")
    grouped = said(report_of([slots_SE], torch.zeros(40).long(), groups=4), "merge or prune")[0]
    assert grouped.startswith("4 of 8 experts per layer leave out 0.0%")
    wide = said(report_of([slots_SE], torch.zeros(40).long(), top_k=7), "merge or prune")[0]
    assert wide.startswith("7 of 8")
    assert said(report_of([slots_SE], torch.zeros(40).long(), top_k=8), "merge or prune") == []


def test_tasks_that_use_their_own_experts_pay() -> None:
    mine = torch.tensor([30, 30, 30, 30, 0, 0, 0, 0])
    slots_SE = torch.stack([mine if s % 2 else mine.flip(0) for s in range(60)])
    report = report_of([slots_SE] * 2, torch.arange(60) % 2)
    (text,) = said(report, "route-tasks")
    assert text == (
        "It would pay for these, whose own 4 experts leave out so much of their slots: a 0.0%, b 0.0%. 4 experts per "
        "layer of all tasks' choice leave out 50.0%; tasks differ in 2 of 2 layers (p <= 0.05)."
    )
    assert next(one.tasks for one in report.advice if one.about == "route-tasks") == ("a", "b")


def test_layers_that_lose_most_are_left_alone() -> None:
    even_SE, narrow_SE = torch.full((40, 4), 30), torch.tensor([[60, 60, 0, 0]]).expand(40, 4).contiguous()
    report = report_of([narrow_SE, even_SE, narrow_SE, narrow_SE], torch.zeros(40).long())
    (text,) = said(report, "leave alone")
    assert text.startswith(
        "Layer 2: reduce least. 2 experts leave out 50.0% (95 %: 50.0% to 50.0%) of slots in layer 2, 12.5%"
    )
    assert report.to_json()["advice"][-1]["layers"] == (2,)


def test_little_text_is_no_ground_for_advice() -> None:
    report = report_of([torch.full((6, 8), 5)], torch.arange(6) % 2)
    assert said(report, "unusual") == ["Too little text to call experts unused: a layer needs 800 slots."]
    assert said(report, "merge or prune") == ["Too few sequences to say to how many experts: 20 are needed."]
    assert said(report, "route-tasks") == []
    assert report.tables()[0].title == "advice"
    assert next(iter(report.to_json())) == "advice"
