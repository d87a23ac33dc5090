"""The examples of docs/extending.md, run as they stand."""

import re
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moetools.forward.options import ForwardOptions
from moetools.methods.base import ExpertTarget
from moetools.pipeline.options import Writing
from moetools.statistics.base import LayerShape, RoutedBatch, RoutedSlots
from moetools.text.options import DataOptions

PAGE = Path(__file__).parents[2] / "docs/extending.md"


@pytest.fixture(scope="module")
def examples():
    """The page's modules, in order: family, statistic, pruning method, merging method, verb."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    modules = []
    for number, block in enumerate(blocks):
        module = types.ModuleType(f"example_{number}")
        exec(compile(block, f"{PAGE.name}[{number}]", "exec"), module.__dict__)
        modules.append(module)
    return modules


@pytest.fixture
def batch():
    # Four tokens, two of three experts each; expert 2 is used once, by token 3.
    index_TK = torch.tensor([[0, 1], [1, 0], [0, 1], [2, 0]])
    weight_TK = torch.tensor([[0.5, 0.25], [0.75, 0.25], [1.0, 0.5], [0.125, 0.625]])
    expert_S, slot_S = index_TK.flatten().sort(stable=True)
    return RoutedBatch(
        hidden_TD=torch.zeros(4, 5),
        router_logits_TE=torch.zeros(4, 3),
        topk_index_TK=index_TK,
        topk_weight_TK=weight_TK,
        task_T=torch.zeros(4, dtype=torch.int64),
        slots=RoutedSlots(
            token_S=slot_S // 2,
            expert_S=expert_S,
            weight_S=weight_TK.flatten()[slot_S],
            counts_E=torch.tensor([4, 3, 1]),
        ),
    )


def test_the_family_has_its_groups_checked(examples):
    arch = examples[0].ARCHITECTURE
    config = {"num_experts": 64, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
    arch.check_expert_count(config, 32)
    assert arch.with_expert_count(config, 32) == {**config, "num_experts": 32}


def test_the_statistic_and_the_method_that_needs_it(examples, batch):
    statistic, method = examples[1].STATISTIC, examples[2].METHOD
    shape = LayerShape(num_experts=3, top_k=2, hidden_size=5, expert_size=4, num_tasks=1)
    state = statistic.init(shape, torch.device("cpu"))
    assert state.keys() == statistic.reductions.keys()
    statistic.update(state, batch)
    merged = statistic.finalize(statistic.merge(state, state))
    # Expert 0: 0.5 + 0.25 + 1 + 0.625, expert 1: 0.25 + 0.75 + 0.5, expert 2: 0.125; every token twice.
    torch.testing.assert_close(merged["total"], 2 * torch.tensor([2.375, 1.5, 0.125], dtype=torch.float64))
    torch.testing.assert_close(merged["mean"], torch.tensor([2.375 / 4, 0.5, 0.125], dtype=torch.float64))

    assert method.needs == (statistic.name,)
    decision = method.plan({statistic.name: merged}, ExpertTarget(num_experts=3, keep=2, layer=0))
    assert decision.clusters == ((0,), (1,))


def test_the_merging_method(examples):
    load = {"load": {"slots": torch.tensor([[1, 3, 5, 5, 0]])}}
    decision = examples[3].METHOD.plan(load, ExpertTarget(num_experts=5, keep=2, layer=0))
    assert decision.clusters == ((1, 0), (2, 3, 4))
    assert decision.weights == ((0.75, 0.25), (0.5, 0.5, 0.0))


def test_the_verb(examples, tiny, stock, tmp_path):
    verb, source, out = examples[4], tiny("mixtral"), tmp_path / "out"
    ids = torch.randint(2, 128, (12, 16), generator=torch.Generator().manual_seed(5))
    save_file({"input_ids": ids}, tmp_path / "tokens.safetensors")
    text = DataOptions(data=[str(tmp_path / "tokens.safetensors")], seq_len=16)

    report = verb.sort_experts(source, out, verb.SortOptions(), text, ForwardOptions(device="cpu"), Writing())

    with torch.no_grad():
        before = stock(source)(ids, output_router_logits=True)
        after = stock(out)(ids)
    for layer, logits_TE in enumerate(before.router_logits):
        slots_E = torch.bincount(logits_TE.topk(2).indices.flatten(), minlength=8)
        assert report.order[layer] == slots_E.argsort(descending=True, stable=True).tolist()
    assert any(order != sorted(order) for order in report.order.values())
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-5)
