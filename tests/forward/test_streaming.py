"""Streamed logits are stock transformers' logits, bit for bit, however the model is streamed."""

import threading
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from streamed import (
    mixed_batches,
    open_model,
    real,
    stock_logits_of,
    streamed_logits,
    token_batch,
)

from moetools.errors import UserError
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel

MODES = {
    "streamed": {},
    "without prefetch": {"prefetch": False},
    "resident": {"resident": True},
    "spilled": {"spill": True, "prefetch": False},
}


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("moetools-layer")]


def on_meta(model: StreamedModel) -> list[bool]:
    return [all(p.is_meta for p in model.stock.layer(index).parameters()) for index in range(model.num_layers)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits_equal_stock(family, mode, tiny, stock):
    path, batches = tiny(family), mixed_batches()
    found = streamed_logits(open_model(path), batches, **MODES[mode])
    for batch, logits in zip(batches, found, strict=True):
        assert torch.equal(real(batch, logits), real(batch, stock_logits_of(stock(path), batch)))


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits_equal_stock(family, tiny, stock):
    """Also with the tensors that a family keeps in fp32 whatever the compute dtype is."""
    path, batches = tiny(family, dtype=torch.float32), mixed_batches()
    reference = stock(path, torch.bfloat16)
    model = open_model(path, dtype="bfloat16")
    for batch, logits in zip(batches, streamed_logits(model, batches, resident=True), strict=True):
        assert torch.equal(real(batch, logits), real(batch, stock_logits_of(reference, batch)))
    expected = {name: tensor.dtype for name, tensor in reference.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in model.stock.model.state_dict().items()} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_checkpoint_gives_the_same_logits(family, tiny, stock, rewrite):
    batch = token_batch(2, 12, padding=(0, 3))
    (logits,) = streamed_logits(open_model(rewrite(tiny(family), shards=3)), [batch])
    assert torch.equal(real(batch, logits), real(batch, stock_logits_of(stock(tiny(family)), batch)))


def test_a_budget_for_one_layer_changes_nothing(tiny, stock):
    path, batches = tiny("mixtral"), mixed_batches()
    plan = open_model(path).memory_plan(batches)
    least = plan.rest + plan.layer + plan.workspace
    model = open_model(path, memory_budget=least)
    tight = model.memory_plan(batches)
    tight.check()
    assert (tight.resident, tight.prefetch, tight.activation_budget) == (False, False, 0)
    assert model.activations(batches, tight).spilled
    found = streamed_logits(model, batches, resident=tight.resident, prefetch=tight.prefetch)
    for batch, logits in zip(batches, found, strict=True):
        assert torch.equal(real(batch, logits), real(batch, stock_logits_of(stock(path), batch)))
    with pytest.raises(UserError, match="too small"):
        open_model(path, memory_budget=least - 1).memory_plan(batches).check()


def test_a_budget_of_zero_is_a_budget(tiny):
    with pytest.raises(UserError, match="memory budget 0 B is too small"):
        open_model(tiny("mixtral"), memory_budget=0).memory_plan(mixed_batches()).check()


def test_extra_outputs_switched_on_in_the_config_do_no_harm(tiny, stock, rewrite):
    path = rewrite(tiny("mixtral"), config={"output_router_logits": True, "output_hidden_states": True})
    batch = token_batch(2, 8)
    (logits,) = streamed_logits(open_model(path), [batch])
    assert torch.equal(logits, stock_logits_of(stock(tiny("mixtral")), batch))


def test_layers_are_freed_one_by_one(tiny):
    model = open_model(tiny("mixtral"))
    for layer in model.layers(prefetch=False):
        assert on_meta(model) == [index != layer.index for index in range(3)]
    assert on_meta(model) == [True] * 3
    assert loader_threads() == []


@pytest.mark.parametrize("prefetch", [True, False])
def test_leaving_the_loop_frees_everything(prefetch, tiny, stock):
    model = open_model(tiny("mixtral"))
    for _ in model.layers(prefetch=prefetch):
        break
    assert loader_threads() == []
    assert on_meta(model) == [True] * 3

    def fail() -> None:
        for layer in model.layers(prefetch=prefetch):
            if layer.index == 1:
                raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        fail()
    assert loader_threads() == []
    assert on_meta(model) == [True] * 3
    batch = token_batch(2, 8)
    (logits,) = streamed_logits(model, [batch])
    assert torch.equal(logits, stock_logits_of(stock(tiny("mixtral")), batch))


def test_resident_layers_are_read_once(tiny, monkeypatch):
    model, batch = open_model(tiny("mixtral")), token_batch(2, 8)
    first = streamed_logits(model, [batch], resident=True)
    read = []
    monkeypatch.setattr(model.stock, "read_layer", read.append)
    assert torch.equal(streamed_logits(model, [batch], resident=True)[0], first[0])
    assert read == []


def test_a_resident_loop_that_ends_early_keeps_what_it_loaded(tiny, monkeypatch):
    model = open_model(tiny("mixtral"))
    for layer in model.layers(resident=True):
        if layer.index == 2:
            break
    monkeypatch.setattr(model.stock, "read_layer", lambda index: pytest.fail(f"layer {index} was read again"))
    assert [layer.index for layer in model.layers(resident=True)] == [0, 1, 2]


@pytest.mark.parametrize("between", [{"resident": False}, {"keep_native": True}, {"keep_native": True, "fill": False}])
def test_resident_then_streamed_then_resident(between, tiny, stock):
    """A layer that another pass freed is not taken for resident."""
    model, batch = open_model(tiny("mixtral")), token_batch(2, 8)
    expected = stock_logits_of(stock(tiny("mixtral")), batch)
    assert torch.equal(streamed_logits(model, [batch], resident=True)[0], expected)
    for _ in model.layers(**between):
        pass
    assert torch.equal(streamed_logits(model, [batch], resident=True)[0], expected)


def test_native_tensors_have_the_dtype_on_disk(tiny):
    model = open_model(tiny("mixtral"), dtype="float32")
    for layer in model.layers(keep_native=True):
        assert {tensor.dtype for tensor in layer.native.values()} == {torch.bfloat16}
        assert {parameter.dtype for parameter in layer.module.parameters()} == {torch.float32}


def test_loading_errors_of_the_thread_reach_the_caller(tiny, monkeypatch):
    model = open_model(tiny("mixtral"))
    load = model.stock.read_layer

    def failing(index: int) -> dict:
        if index == 1:
            raise OSError("disk gone")
        return load(index)

    monkeypatch.setattr(model.stock, "read_layer", failing)
    seen = []

    def run() -> None:
        for layer in model.layers():
            seen.append(layer.index)

    with pytest.raises(OSError, match="disk gone"):
        run()
    assert seen == [0]
    assert loader_threads() == []
    assert on_meta(model) == [True] * 3


def test_options_name_what_is_legal():
    with pytest.raises(UserError, match="'gpuu' is not a device"):
        ForwardOptions(device="gpuu").torch_device()
    with pytest.raises(UserError, match="`dtype=int8` is not a compute dtype"):
        ForwardOptions(device="cpu", dtype="int8").torch_dtype()
    assert ForwardOptions(device="cpu").torch_dtype() == torch.float32
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            ForwardOptions(device="cuda").torch_device()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_fp32_close_to_cpu(family, mode, tiny: Path):
    path, batches = tiny(family), mixed_batches()
    on_cpu = streamed_logits(open_model(path), batches)
    on_gpu = streamed_logits(open_model(path, device="cuda", dtype="float32"), batches, **MODES[mode])
    for batch, cpu, gpu in zip(batches, on_cpu, on_gpu, strict=True):
        assert torch.allclose(real(batch, cpu), real(batch, gpu), atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_loads_on_one_side_stream(tiny, monkeypatch):
    model = open_model(tiny("mixtral"), device="cuda")
    streams = []
    fill = model.stock.fill_layer

    def noting(index: int, tensors: dict) -> torch.nn.Module:
        streams.append(torch.cuda.current_stream().cuda_stream)
        return fill(index, tensors)

    monkeypatch.setattr(model.stock, "fill_layer", noting)
    streamed_logits(model, mixed_batches())
    assert len(set(streams)) == 1
    assert streams[0] != torch.cuda.default_stream().cuda_stream
