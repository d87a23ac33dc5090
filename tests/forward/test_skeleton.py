"""The model without its layers: what enters the first, what each one gets, what comes behind the last."""

import pytest
import torch
from families import FAMILIES
from streamed import mixed_batches, open_model, real, stock_logits_of, token_batch


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_get_what_stock_gives_them(family, tiny, stock):
    """Hidden states into the first layer and every tensor argument, against hooks on a stock run."""
    model, reference = open_model(tiny(family)), stock(tiny(family))
    for batch in mixed_batches():
        calls: list[tuple] = []
        handles = [
            layer.register_forward_pre_hook(
                lambda _module, args, kwargs, calls=calls: calls.append((args, kwargs)), with_kwargs=True
            )
            for layer in reference.model.layers
        ]
        stock_logits_of(reference, batch)
        for handle in handles:
            handle.remove()
        first, found = model.skeleton.enter(batch)
        assert torch.equal(first, calls[0][0][0])
        assert len(found) == len(calls) == 3
        for (args, kwargs), (stock_args, stock_kwargs) in zip(found, calls, strict=True):
            assert len(args) == len(stock_args) - 1
            assert kwargs.keys() == stock_kwargs.keys()
            for name, value in kwargs.items():
                pairs = zip(value, stock_kwargs[name], strict=True) if isinstance(value, tuple) else []
                assert all(torch.equal(mine, theirs) for mine, theirs in pairs), name
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, stock_kwargs[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_behind_the_last_layer(family, tiny, stock):
    model, reference = open_model(tiny(family)), stock(tiny(family))
    batch = token_batch(2, 12, padding=(0, 5))
    kept = []
    handle = reference.model.layers[-1].register_forward_hook(
        lambda _module, _args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    expected = stock_logits_of(reference, batch)
    handle.remove()
    with torch.inference_mode():
        assert torch.equal(real(batch, model.skeleton.logits(batch, kept[0])), real(batch, expected))


def test_the_skeleton_leaves_the_model_as_it_is(tiny):
    model = open_model(tiny("mixtral"))
    layers = list(model.stock.decoder.layers)
    model.skeleton.enter(token_batch(1, 4))
    assert list(model.stock.decoder.layers) == layers
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())


def test_arguments_are_shared_between_batches_of_one_shape(tiny):
    skeleton = open_model(tiny("mixtral")).skeleton
    calls = skeleton.calls(token_batch(2, 8, seed=1))
    assert skeleton.calls(token_batch(2, 8, seed=2)) is calls
    assert skeleton.calls(token_batch(2, 8, padding=(0, 3))) is not calls
    for length in range(10, 20):
        skeleton.calls(token_batch(2, length))
    assert skeleton.calls(token_batch(2, 8)) is not calls
