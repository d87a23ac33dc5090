"""Steered routers against each family's own rule, written out for single tokens."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from moetools.architectures.base import find_architecture
from moetools.errors import UnsupportedModelError, UserError
from moetools.routing.router_control import RouterControl, TaskExperts, find_routers
from moetools.routing.router_rule import RouterRule
from moetools.routing.routing_level import RoutingLevel
from tests.families import FAMILIES

ENDS = torch.arange(128) % 6 == 0


@pytest.fixture
def steered(tiny):
    """(model, control) of a family."""

    def make(family: str):
        path: Path = tiny(family)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        arch = find_architecture(json.loads((path / "config.json").read_text()))
        return model, RouterControl(model, arch, ends_V=ENDS), arch

    return make


@pytest.fixture
def ids():
    return torch.randint(2, 128, (3, 14), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model, control, ids):
    control.begin(ids, torch.ones_like(ids, dtype=torch.bool))
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_and_token_level_are_the_original_bit_for_bit(family, steered, ids):
    model, control, _ = steered(family)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
    everything = TaskExperts(kept={layer: torch.arange(8) for layer in control.layers}, routers={})
    with control.installed():
        assert torch.equal(run(model, control, ids), before)
        control.tasks = [everything]
        assert torch.equal(run(model, control, ids), before)
        control.tasks = [everything, None, everything]
        torch.testing.assert_close(run(model, control, ids), before, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_unit_shares_its_experts(family, steered, ids):
    """Every token of a sequence uses the top-k that the family gives a token with the mean logits."""
    model, control, arch = steered(family)
    (_, router), *_ = find_routers(model, arch).values()
    rest = (find_routers(model, arch)[control.layers[0]][0].e_score_correction_bias,) if family == "minimax_m2" else ()
    hidden = torch.randn(2 * 7, router.weight.shape[1])
    control.level = RoutingLevel(level="sequence", pool="mean-logits", weights="unit")
    with torch.no_grad(), control.installed():
        control.begin(None, torch.ones(2, 7, dtype=torch.bool))
        output = router(hidden, *rest)
    indices = next(part for part in output if not part.is_floating_point())
    rule = RouterRule(router, arch, rest)
    with torch.no_grad():
        own = rule.logits(hidden)
        mean = own.float().view(2, 7, -1).mean(1)
        expected = rule(hidden[:2], lambda _: mean.to(own.dtype))
    for sequence in range(2):
        rows = indices[7 * sequence : 7 * sequence + 7]
        assert all(sorted(row.tolist()) == sorted(expected.index_TK[sequence].tolist()) for row in rows)
        weights = output[1][7 * sequence : 7 * sequence + 7]
        assert (weights - weights[:1]).abs().max() <= 1e-6


def test_own_weights_are_the_softmax_over_the_units_experts(steered):
    """Mixtral by hand: experts by the mean probability, weights by the token's own softmax over them."""
    model, control, arch = steered("mixtral")
    (_, router), *_ = find_routers(model, arch).values()
    hidden = torch.randn(9, router.weight.shape[1])
    control.level = RoutingLevel(level="sequence", pool="mean-probs", weights="token")
    with torch.no_grad(), control.installed():
        control.begin(None, torch.ones(1, 9, dtype=torch.bool))
        _, weights, indices = router(hidden)
        logits = functional.linear(hidden, router.weight)
    best = logits.softmax(1).mean(0).topk(2).indices
    for token in range(9):
        assert indices[token].tolist() == best.tolist()
        torch.testing.assert_close(weights[token], logits[token, best].softmax(0), rtol=1e-5, atol=1e-6)


def test_own_weights_of_a_family_that_does_not_renormalise(steered):
    """Qwen2-MoE by hand: the softmax over all experts, as it is."""
    model, control, arch = steered("qwen2_moe")
    (_, router), *_ = find_routers(model, arch).values()
    hidden = torch.randn(9, router.weight.shape[1])
    control.level = RoutingLevel(level="sequence", pool="mean-logits", weights="token")
    with torch.no_grad(), control.installed():
        control.begin(None, torch.ones(1, 9, dtype=torch.bool))
        _, weights, indices = router(hidden)
        logits = functional.linear(hidden, router.weight)
    assert sorted(indices[0].tolist()) == sorted(logits.mean(0).topk(4).indices.tolist())
    torch.testing.assert_close(weights, logits.softmax(1).gather(1, indices), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "renormalised"), [("mixtral", True), ("qwen2_moe", False), ("gpt_oss", True)])
def test_a_sequences_budget_goes_to_its_best_pairs(family, renormalised, steered):
    """SeqTopK by hand: the T * K largest probabilities of the sequence."""
    model, control, arch = steered(family)
    (_, router), *_ = find_routers(model, arch).values()
    hidden = torch.randn(11, router.weight.shape[1])
    control.level = RoutingLevel(level="sequence", pool="seq-topk")
    with torch.no_grad(), control.installed():
        control.begin(None, torch.ones(1, 11, dtype=torch.bool))
        logits, weights, indices = router(hidden)
    probability = logits.softmax(1)
    chosen = torch.zeros(11 * 8, dtype=torch.bool)
    chosen[probability.flatten().topk(11 * router.top_k).indices] = True
    expected = torch.where(chosen.view(11, 8), probability, 0)
    if renormalised:
        expected = expected / expected.sum(1, keepdim=True).clamp(min=1e-30)
    found = torch.zeros(11, 8).scatter_add(1, indices, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2"])
def test_groups_and_correction_biases_are_kept(family, steered, ids):
    model, control, _ = steered(family)
    kept = {layer: torch.tensor([0, 1, 3, 4, 6, 7]) for layer in control.layers}
    control.tasks = [TaskExperts(kept=kept, routers={})]
    seen = []
    with control.installed():
        for block, _ in find_routers(model, find_architecture(model.config.to_dict())).values():
            block.experts.register_forward_pre_hook(lambda _module, args: seen.append(args[1]))
        run(model, control, ids)
    for indices in seen:
        assert set(indices.flatten().tolist()) <= {0, 1, 3, 4, 6, 7}
        if family == "deepseek_v3":
            # topk_group = 1: all experts of a token come from one half.
            assert ((indices < 4).all(1) | (indices >= 4).all(1)).all()


def test_what_a_family_cannot_do_is_refused(steered, ids):
    model, control, _ = steered("phimoe")
    control.level = RoutingLevel(level="sequence", weights="token")
    with control.installed():
        with pytest.raises(UnsupportedModelError, match="gives no weight to experts it does not choose"):
            run(model, control, ids)
        control.level = RoutingLevel(level="sequence", weights="unit")
        assert run(model, control, ids).isfinite().all()
    model, control, _ = steered("deepseek_v3")
    control.level = RoutingLevel(level="sequence", pool="seq-topk")
    with control.installed(), pytest.raises(UserError, match="router groups"):
        run(model, control, ids)
    control = RouterControl(model, find_architecture(model.config.to_dict()))
    control.level = RoutingLevel(level="sentence")
    with pytest.raises(UserError, match="sentence ends"):
        control.begin(ids, torch.ones_like(ids, dtype=torch.bool))


def test_gradients_reach_the_full_router(steered, ids):
    model, control, arch = steered("mixtral")
    kept = {layer: torch.tensor([1, 2, 5]) for layer in control.layers}
    control.tasks = [TaskExperts(kept=kept, routers={})]
    with control.installed():
        control.begin(ids, torch.ones_like(ids, dtype=torch.bool))
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    for _, router in find_routers(model, arch).values():
        touched = router.weight.grad.abs().sum(1) > 0
        assert touched.nonzero()[:, 0].tolist() == [1, 2, 5]
