"""Where bytes go: sizes as text, the plan's arithmetic, and the plan of a real model."""

import re

import pytest
import torch
from safetensors.torch import load_file
from streamed import mixed_batches, open_model

from moetools.errors import UserError
from moetools.forward.memory import MemoryPlan, default_budget
from moetools.forward.streaming import describe_memory
from moetools.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("17", 17), ("8GiB", 8 * 2**30), ("500MB", 500 * 10**6), ("2g", 2 * 10**9), (" 1.5 kB ", 1500),
        ("3Ti", 3 * 2**40), ("0.5m", 500_000), ("7b", 7),
    ],
)  # fmt: skip
def test_sizes_as_text(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "8 gigs", "-1GB", "8iB", "1e9", "1.2.3GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match=re.escape(f"'{text}' is not a memory size")):
        parse_bytes(text)


def test_sizes_for_people():
    sizes = [0, 999, 1000, 1_234_567, 5 * 10**9, 2 * 10**12]
    assert [format_bytes(size) for size in sizes] == ["0 B", "999 B", "1.00 kB", "1.23 MB", "5.00 GB", "2.00 TB"]


def plan(budget: int) -> MemoryPlan:
    return MemoryPlan(budget=budget, rest=10, layer=20, layers=200, activations=50, workspace=5)


@pytest.mark.parametrize(
    ("budget", "resident", "prefetch", "for_activations", "peak"),
    [
        (10 + 200 + 20 + 50 + 5, True, True, 50, 285),
        (10 + 200 + 20 + 50 + 4, False, True, 284 - 10 - 40 - 5, 10 + 40 + 5 + 50),
        (10 + 40 + 5 + 30, False, True, 30, 85),
        (10 + 40 + 5, False, True, 0, 55),
        (10 + 40 + 4, False, False, 54 - 35, 54),
        (10 + 20 + 5, False, False, 0, 35),
    ],
)
def test_plan(budget, resident, prefetch, for_activations, peak):
    found = plan(budget)
    found.check()
    assert (found.resident, found.prefetch, found.activation_budget, found.peak) == (
        resident, prefetch, for_activations, peak,
    )  # fmt: skip
    assert found.peak <= budget


def test_too_small_a_budget_names_both_numbers():
    with pytest.raises(UserError, match=r"34 B is too small.* need 35 B") as caught:
        plan(34).check()
    assert caught.value.hint == "raise `memory_budget` or lower `batch_size`"


def test_plan_of_a_model(tiny):
    """Against the tensors on disk: the checkpoint is bf16, the run fp32."""
    model = open_model(tiny("mixtral"), memory_budget=10**9)
    sizes = {name: tensor.nbytes for name, tensor in load_file(tiny("mixtral") / "model.safetensors").items()}
    layers = [sum(size for name, size in sizes.items() if f"layers.{index}." in name) for index in range(3)]
    found = model.memory_plan(mixed_batches())
    assert found.budget == 10**9
    assert found.layers == 2 * sum(layers)
    assert found.rest == 2 * (sum(sizes.values()) - sum(layers))
    assert found.layer == 3 * max(layers)
    assert model.memory_plan(mixed_batches(), keep_native=True).layer == 4 * max(layers)
    assert found.activations == 229 * 32 * 4
    # Two experts per token on the largest batch: at the least their inputs, intermediates and outputs.
    assert found.workspace > 60 * 2 * (32 + 24 * 3 + 32) * 4


def test_default_budget_is_less_than_what_is_free():
    import psutil

    assert 0 < default_budget(torch.device("cpu")) < psutil.virtual_memory().total


def test_description():
    assert describe_memory(plan(285)) == "all layers resident; expected peak 285 B of 285 B"
    assert describe_memory(plan(85)).startswith("layers streamed, next one prefetched, activations on disk;")
    assert describe_memory(plan(54)).startswith("layers streamed, activations on disk;")
