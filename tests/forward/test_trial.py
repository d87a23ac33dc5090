"""What the trial on the meta device says about families of every kind, against what their layers get in a real run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from families_contract import make_shrunk, stock_model
from streamed import token_batch
from torch import Tensor

from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import UnsupportedModelError
from moetools.forward.streaming import ForwardOptions, StreamedModel


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    made: dict[str, Any] = {}

    def make(family: str) -> Any:
        if family not in made:
            made[family] = make_shrunk(family, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return make


def running(path: Path) -> StreamedModel:
    return StreamedModel(open_checkpoint(path), ForwardOptions(device="cpu"), only_run=True)


def arguments(model: Any, decoder: Any, ids: Tensor) -> list[list[Tensor]]:
    """Every tensor that each layer of a stock model gets beside the hidden states, in a real run."""
    found: list[list[Tensor]] = []

    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, dict):
            value = list(value.values())
        return [one for inner in value for one in tensors(inner)] if isinstance(value, list | tuple) else []

    handles = [
        layer.register_forward_pre_hook(
            lambda _module, args, kwargs: found.append(tensors([*args[1:], kwargs])), with_kwargs=True
        )
        for layer in decoder.layers
    ]
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


CASES = [*FAMILIES, "gemma4_text", "deepseek_v4", "qwen3_next", "qwen3_vl_moe"]


@pytest.mark.parametrize("family", CASES)
def test_arguments_called_constant_are_the_same_for_other_tokens(family, tiny, shrunk):
    path = tiny(family) if family in FAMILIES else shrunk(family)
    model, reference = running(path), stock_model(path)
    decoder = reference.get_submodule(model.stock.decoder_path)
    one, other = (arguments(reference, decoder, token_batch(2, 9, seed=seed).input_ids) for seed in (1, 2))
    same = all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    assert model.stock.flow.problem is None
    assert model.stock.flow.constant == same
    assert same == (family not in ("gemma4_text", "deepseek_v4"))


def test_parallel_streams_lie_side_by_side(shrunk):
    model = running(shrunk("deepseek_v4"))
    assert model.stock.flow.tail == (4, 32)
    assert model.stream_width == 128
    assert model.skeleton.enter(token_batch(2, 5))[0].shape == (2, 5, 128)


def test_a_vision_tower_is_not_loaded(shrunk):
    model = running(shrunk("qwen3_vl_moe"))
    assert model.stock.flow.idle == ("model.visual",)
    assert model.skeleton is not None
    loaded = {name.split(".")[1] for name, tensor in model.stock.model.state_dict().items() if not tensor.is_meta}
    assert loaded == {"language_model", "weight"}


@pytest.mark.parametrize("family", ["zaya", "glm_moe_dsa"])
def test_layers_that_hand_on_more_than_hidden_states_are_refused(family, shrunk):
    with pytest.raises(UnsupportedModelError, match="its layers hand on more than hidden states"):
        running(shrunk(family))
