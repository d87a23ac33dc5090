"""What is discovered about a family is what its own file says, and what cannot be is refused with what was found."""

import json
from typing import Any

import pytest
import transformers
from families import COMMON, FAMILIES, SHRUNK_OVERRIDES
from tiny_configs import families, merged, shrunk

from moetools.architectures.base import Architecture, find_architecture
from moetools.architectures.discovery import discover
from moetools.errors import UnsupportedModelError
from moetools.plugins import plugin_names

DESCRIBED = [name for name in FAMILIES if name.replace("_", "-") in plugin_names("moetools.architectures.families")]
SAME_RATIOS = {"topk_softmax": "softmax", "sparsemixer": "other"}
"""Softmax over the chosen experts and over all of them give weights of the same ratios."""


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model of the family, as stock saves it."""
    config_class = transformers.CONFIG_MAPPING[family]
    if family in FAMILIES:
        config = config_class(**{**COMMON, **FAMILIES[family], **changes})
    else:
        small = merged(shrunk(config_class().to_dict()), SHRUNK_OVERRIDES.get(family, {}))
        config = config_class.from_dict(merged(small, changes))
    return json.loads(config.to_json_string()) | {"architectures": [families()[family]]}


@pytest.mark.parametrize("family", DESCRIBED)
def test_discovery_agrees_with_the_family_file(family):
    config = config_of(family)
    written, found = find_architecture(config), discover(config)
    assert found.problem is None
    for field in ("router", "experts", "router_bias", "correction_bias", "at"):
        assert getattr(found, field) == getattr(written, field), field
    assert found.scoring == SAME_RATIOS.get(written.scoring, written.scoring)
    assert (found.num_experts(config), found.top_k(config)) == (8, written.top_k(config))
    assert found.num_groups(config) == written.num_groups(config)
    assert found.with_expert_count(config, 4) == written.with_expert_count(config, 4)
    assert found.with_expert_count(config, 1) == written.with_expert_count(config, 1)


EXPECTED: dict[str, dict[str, Any]] = {
    "hunyuan_v1_moe": {"router": "gate.wg", "scoring": "softmax"},
    "lfm2_moe": {"router": "gate", "correction_bias": "expert_bias", "scoring": "sigmoid"},
    "hy_v3": {"router": "gate", "correction_bias": "e_score_correction_bias", "scoring": "sigmoid"},
    "jamba": {"router": "router", "scoring": "softmax"},
    "kimi_linear": {"group_key": "num_expert_group", "scoring": "sigmoid"},
    "gemma4_text": {"router": "router.proj", "expert_scale": "router.per_expert_scale", "scoring": "softmax"},
    "qwen3_vl_moe": {"at": ("text_config",), "router": "gate", "scoring": "softmax"},
    "nemotron_h": {"router": "gate", "correction_bias": "gate.e_score_correction_bias", "scoring": "sigmoid"},
}


@pytest.mark.parametrize("family", EXPECTED)
def test_families_without_a_file(family):
    """Expected values were read in transformers' modelling code."""
    found = find_architecture(config_of(family))
    assert {field: getattr(found, field) for field in EXPECTED[family]} == EXPECTED[family]


def test_a_nested_config_changes_where_it_counts():
    config = config_of("qwen3_vl_moe")
    arch = find_architecture(config)
    (key,) = [key for key in ("num_experts", "num_local_experts") if key in config["text_config"]]
    changed = arch.with_expert_count(config, 3)
    assert changed == {**config, "text_config": {**config["text_config"], key: 3}}
    assert config["text_config"][key] == 8
    assert (arch.num_experts(changed), arch.top_k(changed)) == (3, 2)


def test_lists_by_layer_stay_lists():
    config = config_of("hunyuan_v1_moe") | {"moe_topk": [2, 2, 2, 2], "num_experts": 8}
    arch = find_architecture(config)
    assert (arch.num_experts(config), arch.top_k(config)) == (8, 2)
    assert arch.with_expert_count(config, 1)["moe_topk"] == [1, 1, 1, 1]


REFUSED = {
    "inkling_text": r"mlp\.gate\.weight' is \[9, 32\] for 8 experts, \[17, 32\] for twice those",
    "zaya": r"balancing_biases' is \[9\] for 8 experts",
    "deepseek_v4": r"'gate\.tid2eid' \[128, 2\] holds whole numbers",
    "ernie4_5_vl_moe": "MoE blocks that differ: .*text_moe.*vision_moe",
    "llama4_text": "no layer runs its experts through transformers' experts interface",
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_discovered_is_refused_with_what_was_found(family):
    config = config_of(family)
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
        find_architecture(config)
    assert find_architecture(config, dense=True).problem is not None


def test_a_dense_model_is_not_built(monkeypatch):
    monkeypatch.setattr("moetools.architectures.discovery.discover", lambda _: pytest.fail("it was built"))
    config = json.loads(transformers.LlamaConfig().to_json_string()) | {"model_type": "llama"}
    assert find_architecture(config, dense=True) == Architecture(model_type="llama")
