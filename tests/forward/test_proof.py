"""Where the trial fails, a small batch is compared with stock's own forward."""

from dataclasses import replace

import pytest
import torch
from streamed import open_model, real, stock_logits_of, streamed_logits, token_batch

from moetools.errors import UnsupportedModelError
from moetools.forward.skeleton import Skeleton


def unproven(path, **options):
    model = open_model(path, **options)
    model.stock.flow = replace(model.stock.flow, constant=False, problem="no number on the meta device")
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_agrees_runs(dtype, tiny, stock):
    batch = token_batch(2, 9, padding=(0, 2))
    (logits,) = streamed_logits(unproven(tiny("mixtral"), dtype=dtype), [batch])
    expected = stock_logits_of(stock(tiny("mixtral"), getattr(torch, dtype)), batch)
    assert torch.equal(real(batch, logits), real(batch, expected))


def test_one_that_differs_is_refused(tiny, monkeypatch):
    run = Skeleton.run

    def shifted(self, module, index, batch, hidden):
        """As if the second layer got other arguments than stock gives it."""
        return run(self, module, index, batch, hidden) + (0.05 if index == 1 else 0.0)

    monkeypatch.setattr(Skeleton, "run", shifted)
    with pytest.raises(UnsupportedModelError, match="not those of stock's own forward"):
        streamed_logits(unproven(tiny("mixtral")), [token_batch(1, 4)])


def test_one_too_large_to_compare_is_said(tiny):
    model = unproven(tiny("mixtral"))
    model.memory_budget = 1000
    with pytest.warns(UserWarning, match="too large to be compared"):
        assert model.skeleton is not None
