"""Values of config.json that once led to internal errors, and sizes that the tensors cannot fill."""

import math
import time
from pathlib import Path
from typing import Any

import pytest

from moetools.architectures.base import find_architecture
from moetools.architectures.config_check import check_config, check_sizes, most_experts
from moetools.checkpoint.headers import TensorInfo
from moetools.errors import CheckpointError

GOOD: dict[str, Any] = {
    "model_type": "qwen2_moe", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 16,
    "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": -1, "eos_token_id": [1, 2], "head_dim": None,
    "rope_parameters": {"rope_theta": 10000.0}, "layer_types": None, "time_step_limit": [0.0, math.inf],
}  # fmt: skip


def tensors(*names: str, shape: tuple[int, ...] = (8, 8)) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, "BF16", shape, 2 * math.prod(shape), Path("x"), 0) for name in names}


def layers(count: int, experts: int = 4) -> dict[str, TensorInfo]:
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
        for layer in range(count)
        for expert in range(experts)
    ]
    return tensors(*names)


def test_what_real_models_say_is_accepted() -> None:
    check_config(GOOD)
    check_sizes(GOOD, find_architecture(GOOD), layers(2), "M")
    # glm5_next's own default, and what Mixtral takes as "hidden size by heads".
    check_config(GOOD | {"head_dim": 0})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", "8"),
        ("layer_types", -1),
        ("layer_types", ["full_attention", 3]),
        ("num_hidden_layers", None),
        ("num_hidden_layers", 2.0),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**30),
        ("num_key_value_heads", 0),
        ("decoder_sparse_step", 0),
        ("head_dim", math.inf),
        ("head_dim", math.nan),
        ("quantization_config", 1.5),
        ("pad_token_id", 2**63),
        ("pad_token_id", "\ud800"),
        ("eos_token_id", [1, "x"]),
        ("model_type", 7),
        ("num_experts", 2**31),
        ("rms_norm_eps", math.nan),
        ("rope_theta", "x"),
        ("routed_scaling_factor", 10**400),
        ("tie_word_embeddings", "yes"),
        ("moetools_experts_per_layer", {"0": 0}),
        ("moetools_experts_per_layer", {"x": 1}),
    ],
    ids=ascii,
)
def test_values_that_cannot_be_are_refused_here_and_when_nested(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {key} "):
        find_architecture(GOOD | {key: value})
    with pytest.raises(CheckpointError, match=f"text_config: {key} "):
        check_config({"model_type": "x", "text_config": GOOD | {key: value}})


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": 3},
        {"format": ["x"]},
        {"config_groups": []},
        {"config_groups": {"a": 1}},
        {"config_groups": {"a": {"targets": "Linear"}}},
        {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": "4"}}}},
        {"config_groups": {"a": {"targets": ["Linear"], "weights": {"symmetric": 1}}}},
        {"ignore": [1]},
        {"groups": {"a": 1}},
    ],
)
def test_packing_that_cannot_be_is_refused(quantization: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config: "):
        check_config(GOOD | {"quantization_config": quantization})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, but 2 layers are on disk; layer 2 is not"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, but 2 layers"),
        ({"num_hidden_layers": 1}, "num_hidden_layers 1, but layer 1 is on disk too"),
        ({"num_experts": 2**31 - 1}, "2147483647 experts, but no layer has more than 4"),
        ({"num_experts": 5}, "5 experts, but no layer has more than 4"),
    ],
)
def test_promises_that_the_tensors_do_not_keep_are_refused_at_once(changes: dict[str, int], message: str) -> None:
    config = GOOD | changes
    began = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        check_sizes(config, find_architecture(config), layers(2), "M")
    assert time.process_time() - began < 1


def test_layers_for_prediction_may_stand_behind() -> None:
    config, arch = GOOD, find_architecture(GOOD)
    more = tensors("model.layers.2.mlp.experts.0.up_proj.weight", "model.layers.2.eh_proj.weight")
    check_sizes(config, arch, layers(2) | more, "M")
    with pytest.raises(CheckpointError, match="layer 3 is on disk too"):
        check_sizes(config, arch, layers(2) | more | tensors("model.layers.3.mlp.gate.weight"), "M")
    check_sizes(config | {"num_nextn_predict_layers": 1}, arch, layers(3), "M")


def test_experts_are_counted_in_every_layout() -> None:
    arch = find_architecture(GOOD)
    assert most_experts(layers(2, experts=6), arch) == 6
    fused = tensors("model.layers.0.mlp.experts.gate_up_proj", shape=(5, 16, 8))
    assert most_experts(fused, arch) == 5
    empty = tensors("model.layers.0.mlp.experts.gate_up_proj", shape=(10**9, 0, 1))
    assert most_experts(empty | layers(1), arch) == 4
    assert most_experts(tensors("h.0.router", shape=(7, 3)), arch) == 7


@pytest.mark.parametrize(
    ("top_k", "why"), [(0, "every token needs one of the 4 experts"), (5, "there are only 4 experts")]
)
def test_a_router_that_cannot_choose_is_refused(top_k: int, why: str) -> None:
    with pytest.raises(CheckpointError, match=f"num_experts_per_tok {top_k}, but {why}"):
        find_architecture(GOOD | {"num_experts_per_tok": top_k})


def test_groups_must_divide_the_experts() -> None:
    config = {**GOOD, "model_type": "deepseek_v3", "n_routed_experts": 6, "n_group": 4, "topk_group": 1}
    with pytest.raises(CheckpointError, match="1 of 4 groups, but 6 experts"):
        find_architecture(config)
