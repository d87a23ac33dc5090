"""Statistics of a streamed pass against one big batch, and statistics files."""

import json
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from safetensors import safe_open
from safetensors.torch import save_file
from streamed import mixed_batches, open_model, stock_logits_of, token_batch, token_data

from moetools.errors import StatisticsError, UserError
from moetools.forward.calibrate import (
    ModelStatistics,
    calibration_plan,
    check_statistics,
    collect_statistics,
    load_statistic,
    load_statistics,
)
from moetools.plugins import plugin_names

EVERY = plugin_names("moetools.statistics")


@pytest.fixture(scope="module")
def measured(tiny) -> ModelStatistics:
    return collect_statistics(open_model(tiny("mixtral")), token_data(mixed_batches()), EVERY)


@pytest.mark.parametrize("family", FAMILIES)
def test_load_and_reap_equal_sums_over_a_stock_run(family, tiny, stock):
    """By hooks on stock's experts modules: who got which token, and that expert's output alone."""
    batches, reference = mixed_batches(), stock(tiny(family))
    found = collect_statistics(open_model(tiny(family)), token_data(batches), ["load", "reap", "mean_output"])
    slots = {layer: torch.zeros(2, 8).long() for layer in found.layers}
    norms = {layer: torch.zeros(2, 8).double() for layer in found.layers}
    totals = {layer: torch.zeros(8, 32).double() for layer in found.layers}
    for batch in batches:
        calls = {}
        handles = [
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name, calls=calls: calls.update(
                    {name: (module, *args, *kwargs.values())}
                ),
                with_kwargs=True,
            )
            for name, module in reference.named_modules()
            if name.endswith(".experts")
        ]
        stock_logits_of(reference, batch)
        for handle in handles:
            handle.remove()
        for name, (module, hidden, index, weight) in calls.items():
            layer, task = int(name.split(".")[2]), int(batch.task[0])
            hidden = hidden.flatten(0, -2)
            real = torch.ones(len(hidden)).bool() if batch.attention_mask is None else batch.attention_mask.flatten()
            for expert in range(8):
                token, rank = ((index == expert) & real[:, None]).nonzero(as_tuple=True)
                if not len(token):
                    continue
                with torch.no_grad():
                    alone = module(hidden[token], torch.full((len(token), 1), expert), torch.ones(len(token), 1))
                slots[layer][task, expert] += len(token)
                norms[layer][task, expert] += (weight[token, rank] * alone.norm(dim=1)).sum()
                totals[layer][expert] += alone.sum(0)
    assert len(slots) == len(open_model(tiny(family)).stock.moe_layers)
    for layer, states in found.layers.items():
        assert torch.equal(states["load"]["slots"], slots[layer])
        assert torch.allclose(states["reap"]["weighted_norm"], norms[layer], rtol=1e-4)
        assert torch.allclose(states["mean_output"]["total"], totals[layer], rtol=1e-4, atol=1e-4)


def test_many_batches_equal_one(tiny):
    """Twelve sequences at once, in threes, and one by one with padding behind."""
    whole = token_batch(12, 16, seed=7)
    threes = [replace(whole, input_ids=ids, task=whole.task[:3]) for ids in whole.input_ids.split(3)]
    padded = []
    for ids in whole.input_ids:
        row = torch.cat([ids, torch.ones(4).long()])[None]
        padded.append(replace(whole, input_ids=row, attention_mask=torch.arange(20)[None] < 16, task=whole.task[:1]))
    first, *others = [
        collect_statistics(open_model(tiny("mixtral")), token_data(batches, ("all",)), EVERY)
        for batches in ([whole], threes, padded)
    ]
    assert first.provenance.num_tokens == 12 * 16
    for other in others:
        assert other.provenance == first.provenance
        for layer, name in [(layer, name) for layer in first.layers for name in EVERY]:
            for key, tensor in first.layers[layer][name].items():
                assert torch.allclose(other.layers[layer][name][key].double(), tensor.double(), rtol=1e-4, atol=1e-5)


def test_budget_and_streaming_change_nothing(tiny, measured):
    model = open_model(tiny("mixtral"))
    plan = calibration_plan(model, token_data(mixed_batches()), EVERY)
    tight = open_model(tiny("mixtral"), memory_budget=plan.rest + plan.layer + plan.workspace + plan.scratch)
    found = collect_statistics(tight, token_data(mixed_batches()), EVERY)
    for layer, statistics in measured.layers.items():
        for name, state in statistics.items():
            for key, tensor in state.items():
                assert torch.equal(found.layers[layer][name][key], tensor), (layer, name, key)


def test_provenance(tiny, measured):
    model = open_model(tiny("mixtral"))
    assert measured.names == tuple(sorted(EVERY))
    assert list(measured.layers) == [0, 1, 2]
    known = measured.provenance
    assert (known.model, known.data) == (model.checkpoint.fingerprint(), "of these batches")
    assert (known.tasks, known.dtype) == (("first", "second"), "float32")
    assert known.num_tokens == 60 + (20 + 13) + (8 + 7 + 6 + 3) + 60 + 33
    shape = measured.shape
    assert (shape.num_experts, shape.top_k, shape.hidden_size, shape.expert_size) == (8, 2, 32, 24)
    assert (shape.num_tasks, shape.scoring) == (2, "softmax")
    assert open_model(tiny("deepseek_v3")).layer_shape(1).scoring == "sigmoid"
    assert open_model(tiny("gpt_oss")).layer_shape(1).expert_size == 24


def test_only_moe_layers_have_statistics(tiny):
    found = collect_statistics(open_model(tiny("qwen2_moe")), token_data([token_batch(2, 6)]), ["load"])
    assert list(found.layers) == [0, 2]


def test_calibration_twice_with_one_model(tiny, measured):
    model = open_model(tiny("mixtral"))
    for _ in range(2):
        found = collect_statistics(model, token_data(mixed_batches()), ["load"])
        for layer in (0, 1, 2):
            assert torch.equal(found.layers[layer]["load"]["slots"], measured.layers[layer]["load"]["slots"])


def test_too_small_a_budget_is_refused_before_anything_is_read(tiny, monkeypatch):
    model = open_model(tiny("mixtral"), memory_budget=1000)
    monkeypatch.setattr(model.stock, "load_rest", lambda: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=r"memory budget 1.00 kB is too small.*need \d"):
        collect_statistics(model, token_data(mixed_batches()), ["load"])


class Noted:
    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def start(self, task: str, *, layers: int, tokens: int, weights: list[float] | None = None) -> None:
        assert weights is not None
        assert len(weights) == layers
        self.calls.append(("start", task, layers, tokens))

    def layer(self, index: int) -> None:
        self.calls.append(("layer", index))

    def phase(self, name: str) -> None:
        self.calls.append(("phase", name))

    def advance(self, tokens: int) -> None:
        self.calls.append(("advance", tokens))

    def stop(self) -> None:
        self.calls.append(("stop",))


def test_progress_counts_real_tokens(tiny):
    model = open_model(tiny("mixtral"))
    model.progress = noted = Noted()
    collect_statistics(model, token_data(mixed_batches()), ["load"])
    assert noted.calls[0] == ("start", "calibrating", 3, 210)
    assert noted.calls[-1] == ("stop",)
    assert [call[1] for call in noted.calls if call[0] == "layer"] == [0, 1, 2]
    assert sum(call[1] for call in noted.calls if call[0] == "advance") == 3 * 210


def test_progress_stops_when_a_statistic_fails(tiny, monkeypatch):
    model = open_model(tiny("mixtral"))
    model.progress = noted = Noted()

    def fail(*_args: object) -> None:
        raise RuntimeError("statistic")

    monkeypatch.setattr(type(load_statistic("load")), "update", fail)
    with pytest.raises(RuntimeError, match="statistic"):
        collect_statistics(model, token_data(mixed_batches()), ["load"])
    assert noted.calls[-1] == ("stop",)


def test_save_and_load(measured, tmp_path):
    file = tmp_path / "kept.safetensors"
    measured.save(file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    found = load_statistics(file)
    assert (found.provenance, found.shape, found.names) == (measured.provenance, measured.shape, measured.names)
    assert list(found.layers) == [0, 1, 2]
    for layer in found.layers:
        for name, state in measured.layers[layer].items():
            assert found.layers[layer][name].keys() == state.keys()
            for key, tensor in state.items():
                assert found.layers[layer][name][key].dtype == tensor.dtype
                assert torch.equal(found.layers[layer][name][key], tensor)
        total = found.finalized(layer)["load"]["share"].sum(1)
        assert torch.allclose(total, torch.ones_like(total))


def check(measured: ModelStatistics, **changes: object) -> None:
    known = measured.provenance
    check_statistics(measured, **{"model": known.model, "needs": ("reap",), "data": known.data} | changes)


def test_statistics_of_the_same_run_are_accepted(measured):
    check(measured)
    check(measured, data=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "f" * 64}, r"another model \(fingerprint [0-9a-f]{12}, this one is ffffffffffff\)"),
        ({"data": "e" * 64}, r"other tokens \(fingerprint of these bat, `data` gives eeeeeeeeeeee\)"),
        ({"needs": ("reap", "hessian", "gram")}, "lack hessian, gram; they have coactivation"),
    ],
)
def test_stale_statistics_are_refused(changes, message, measured):
    with pytest.raises(StatisticsError, match=message) as caught:
        check(measured, **changes)
    assert caught.value.hint


def test_damaged_files_are_refused(measured, tmp_path):
    whole = tmp_path / "whole.safetensors"
    measured.save(whole)
    content = whole.read_bytes()
    with safe_open(whole, "pt") as stored:
        metadata, tensors = stored.metadata(), {key: stored.get_tensor(key) for key in sorted(stored.keys())}
    provenance = json.loads(metadata["provenance"])
    odd = {
        "missing": None,
        "empty": b"",
        "half": content[: len(content) // 2],
        "short": content[:-1],
        "text": b"load reap" * 100,
    }
    for name, data in odd.items():
        file = tmp_path / f"{name}.safetensors"
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(StatisticsError, match=f"{name}.safetensors: cannot be read as statistics"):
            load_statistics(file)
    wrong = {
        "not a statistics file": (tensors, {"format": "pt"}),
        "cannot be read as statistics": (tensors, {k: v for k, v in metadata.items() if k != "shape"}),
        "read as statistics: .*unexpected": (tensors, metadata | {"provenance": json.dumps(provenance | {"seed": 1})}),
        "read as statistics: .*tasks": (tensors, metadata | {"provenance": json.dumps({"model": "x"})}),
        "read as statistics: .*unpack": ({"odd": torch.zeros(1)}, metadata),
        "holds no statistics": ({}, metadata),
    }
    for message, (kept, meta) in wrong.items():
        save_file(kept, tmp_path / "wrong.safetensors", metadata=meta)
        with pytest.raises(StatisticsError, match=message):
            load_statistics(tmp_path / "wrong.safetensors")
    with pytest.raises(StatisticsError):
        load_statistics(tmp_path)


def test_unknown_statistics_get_a_hint():
    with pytest.raises(UserError, match="unknown statistic 'raep'") as caught:
        load_statistic("raep")
    assert caught.value.hint == "did you mean 'reap'?"
