"""Weights and hidden states that are NaN or infinite are refused where they arise."""

import re

import pytest
import torch
from streamed import open_model, streamed_logits, token_batch
from torch import Tensor

from moetools.errors import CheckpointError

EXPERT = "model.layers.1.block_sparse_moe.experts.5.w3.weight"


def with_value(name: str, value: float):
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = tensors[name].clone()
        changed.view(-1)[3] = value
        return {**tensors, name: changed}

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [EXPERT, "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_a_weight_is_refused_by_its_name_on_disk(name, value, tiny, rewrite):
    model = open_model(rewrite(tiny("mixtral"), with_value(name, value)))
    with pytest.raises(CheckpointError, match=rf"tensor '{re.escape(name)}' has values that are NaN or infinite"):
        streamed_logits(model, [token_batch(1, 4)])


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj.weight", "model.norm.weight"])
def test_integers_are_no_weights(name, tiny, rewrite):
    """The codes of packed weights whose scales are lost: found by fuzzing, as an error from inside torch."""
    model = open_model(rewrite(tiny("mixtral"), lambda tensors: {**tensors, name: tensors[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"weight '{name}' is stored as int8"):
        streamed_logits(model, [token_batch(1, 4)])


def test_eight_bit_floats_are_judged_as_the_numbers_they_are(tiny, rewrite):
    """torch compares none of them: found by fuzzing."""
    name = "model.layers.1.self_attn.o_proj.weight"
    model = open_model(rewrite(tiny("mixtral"), lambda found: {**found, name: found[name].to(torch.float8_e4m3fn)}))
    assert streamed_logits(model, [token_batch(1, 4)])[0].isfinite().all()
    bad = open_model(
        rewrite(tiny("mixtral"), lambda found: {**found, name: (found[name] * torch.nan).to(torch.float8_e5m2)})
    )
    with pytest.raises(CheckpointError, match=rf"tensor '{re.escape(name)}' has values that are NaN or infinite"):
        streamed_logits(bad, [token_batch(1, 4)])


def test_reading_without_running_refuses_too(tiny, rewrite):
    model = open_model(rewrite(tiny("mixtral"), with_value(EXPERT, float("nan"))))
    with pytest.raises(CheckpointError, match=re.escape(EXPERT)):
        list(model.layers(keep_native=True, fill=False))


def test_an_overflow_names_layer_and_dtype(tiny, rewrite):
    """Finite weights whose products are beyond 65,504: refused in fp16, computed in fp32."""
    name = "model.layers.1.self_attn.o_proj.weight"
    path = rewrite(tiny("mixtral"), lambda tensors: {**tensors, name: tensors[name] * 1e5 + 1e5})
    with pytest.raises(CheckpointError, match="layer 1 computes values that are NaN or infinite in float16") as caught:
        streamed_logits(open_model(path, dtype="float16"), [token_batch(2, 6)])
    assert "`dtype=float32`" in caught.value.hint
    (logits,) = streamed_logits(open_model(path), [token_batch(2, 6)])
    assert logits.isfinite().all()


def test_positions_without_a_token_may_hold_anything(tiny):
    model, batch = open_model(tiny("mixtral")), token_batch(2, 6, padding=(0, 2))
    hidden = torch.ones(2, 6, model.stream_width)
    hidden[1, 4:] = float("nan")
    model._guard.see(0, hidden, batch)
    hidden[1, 3] = float("nan")
    with pytest.raises(CheckpointError, match="layer 0"):
        model._guard.see(0, hidden, batch)


def test_each_layer_is_judged_once(tiny, monkeypatch):
    model = open_model(tiny("mixtral"))
    list(model.layers())
    monkeypatch.setattr("moetools.forward.stock.refuse_weights", lambda *_: pytest.fail("judged again"))
    list(model.layers())
