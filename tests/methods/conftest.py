"""Finalized statistics and layer weights of made-up layers."""

import pytest
import torch
from torch.nn import functional

from moetools.architectures.weights import LayerWeights
from moetools.methods.base import ExpertTarget, LayerSample
from moetools.plugins import load_plugin, plugin_names


@pytest.fixture
def make_target():
    def make(keep, experts=8, groups=1, layer=3, seed=0, protected=()) -> ExpertTarget:
        return ExpertTarget(
            num_experts=experts, keep=keep, num_groups=groups, layer=layer, seed=seed, protected=protected
        )

    return make


@pytest.fixture
def make_statistics():
    """Random values of every finalized quantity that a method reads."""

    def make(experts=8, hidden=5, seed=0, slots=None):
        generator = torch.Generator().manual_seed(seed)
        per_task_slots = torch.randint(1, 1000, (2, experts), generator=generator)
        if slots is not None:
            per_task_slots = torch.tensor([slots, [0] * experts])
        mean = torch.randn(experts, hidden, generator=generator, dtype=torch.float64)
        profiles = torch.randn(2, experts, 6, generator=generator, dtype=torch.float64)
        router, gated = functional.normalize(profiles, dim=2) @ functional.normalize(profiles, dim=2).transpose(1, 2)
        return {
            "load": {"slots": per_task_slots},
            "reap": {"saliency": torch.rand(experts, generator=generator, dtype=torch.float64)},
            "ream_saliency": {"saliency": torch.rand(experts, generator=generator, dtype=torch.float64)},
            "ean": {"norm": torch.rand(experts, generator=generator, dtype=torch.float64) * 100},
            "mean_output": {"mean": mean},
            "router": {"gate_mass": torch.rand(2, experts, generator=generator, dtype=torch.float64) * 50},
            "easy_ep": {"score": torch.rand(experts, generator=generator, dtype=torch.float64) * 9},
            "max_activation": {"peak": torch.rand(experts, generator=generator)},
            "router_similarity": {"similarity": router},
            "gated_similarity": {"cosine": gated},
        }

    return make


@pytest.fixture
def make_weights():
    def make(experts=8, hidden=5, width=4, dtype=torch.float32, seed=0) -> LayerWeights:
        generator = torch.Generator().manual_seed(seed)

        def random(*size):
            return torch.randn(*size, generator=generator).to(dtype)

        return LayerWeights(
            up_EFD=random(experts, width, hidden),
            gate_EFD=random(experts, width, hidden),
            down_EDF=random(experts, hidden, width),
            down_bias_ED=random(experts, hidden),
            router_ED=random(experts, hidden),
            correction_bias_E=random(experts),
        )

    return make


def route_top2(logits, kept):
    """The softmax router most families have: the two best, weights renormalised."""
    weight, index = logits.topk(min(2, logits.shape[1]), dim=1)
    return index, weight.softmax(1)


@pytest.fixture
def make_sample():
    def make(tokens=40, experts=8, hidden=5, seed=0, route=route_top2) -> LayerSample:
        generator = torch.Generator().manual_seed(seed)
        return LayerSample(
            hidden_ND=torch.randn(tokens, hidden, generator=generator),
            logits_NE=torch.randn(tokens, experts, generator=generator) * 2,
            activate=lambda gate, up: up.relu() if gate is None else functional.silu(gate) * up,
            route=route,
        )

    return make


def all_methods():
    found = []
    for family in ("prune", "merge"):
        package = f"moetools.methods.{family}"
        found += [(package, name) for name in plugin_names(package)]
    return found


def pytest_generate_tests(metafunc):
    if "method_file" in metafunc.fixturenames:
        metafunc.parametrize("method_file", all_methods(), ids=lambda found: found[1])


@pytest.fixture
def method(method_file):
    return load_plugin(*method_file, kind="method").METHOD
