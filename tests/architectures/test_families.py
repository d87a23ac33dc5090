"""What each family file says, checked on real tensor names and configs."""

import json
import re

import pytest
from families import ENCODER_DECODERS, FAMILIES
from safetensors import safe_open

from moetools.architectures.base import find_architecture
from moetools.errors import UnsupportedModelError, UserError
from moetools.plugins import plugin_names

PARTS = {
    "experts": [
        "mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias",
        "mlp.experts.down_proj", "mlp.experts.down_proj_bias",
        "mlp.experts.#.gate_proj.weight", "mlp.experts.#.up_proj.weight", "mlp.experts.#.down_proj.weight",
        "block_sparse_moe.experts.#.w#.weight",
        "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight",
    ],
    "shared experts": [
        "mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight", "mlp.shared_expert.down_proj.weight",
        "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight",
        "mlp.shared_experts.down_proj.weight", "mlp.shared_expert_gate.weight",
    ],
    "router": [
        "mlp.gate.weight", "mlp.gate.e_score_correction_bias", "mlp.moe_statics.e_score_correction_bias",
        "mlp.router.weight", "mlp.router.bias", "block_sparse_moe.gate.weight", "block_sparse_moe.router.layer.weight",
        "block_sparse_moe.e_score_correction_bias",
    ],
    "dense mlp": ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"],
    "attention": [
        *(f"self_attn.{name}_proj.{leaf}" for name in "qkvo" for leaf in ("weight", "bias")),
        *(f"self_attn.{name}.weight" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
        "self_attn.sinks",
    ],
    "norm": [
        "model.norm.weight", "model.norm.bias",
        "input_layernorm.weight", "input_layernorm.bias", "post_attention_layernorm.weight",
        "post_attention_layernorm.bias", "post_feedforward_layernorm.weight",
        *(f"self_attn.{name}.weight" for name in ("q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm")),
    ],
    "embedding": ["model.embed_tokens.weight", "lm_head.weight"],
}  # fmt: skip
PART_OF = {name: part for part, names in PARTS.items() for name in names}
GROUPED = ("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1")
TWO_PER_GROUP = ("deepseek_v3", "glm4_moe", "dots1")


def config_of(path) -> dict:
    return json.loads((path / "config.json").read_text())


def test_every_family_file_is_tested():
    described = {name.replace("-", "_") for name in plugin_names("moetools.architectures.families")}
    assert described - ENCODER_DECODERS == set(FAMILIES) - {"flex_olmo"}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_extras(family, tiny):
    config = config_of(tiny(family))
    arch = find_architecture(config)
    with safe_open(tiny(family) / "model.safetensors", "pt") as file:
        names = sorted(file.keys())
    assert len(names) > 20
    for name in names:
        kind = re.sub(r"\d+", "#", re.sub(r"model\.layers\.\d+\.", "", name))
        assert arch.part_of(name) == PART_OF[kind], name
        assert not arch.is_extra(name, config), name
    assert {"experts", "router", "attention", "norm", "embedding"} <= {arch.part_of(name) for name in names}
    assert arch.is_extra("model.layers.3.enorm.weight", config)
    assert arch.is_extra("model.layers.30.mlp.experts.0.up_proj.weight", config)
    assert arch.is_extra("model.layers.0.self_attn.rotary_emb.inv_freq", config)
    assert arch.part_of("model.something") == "other"


@pytest.mark.parametrize("family", FAMILIES)
def test_counts(family, tiny):
    config = config_of(tiny(family))
    arch = find_architecture(config)
    assert arch.model_type == family
    assert arch.num_experts(config) == 8
    assert arch.top_k(config) == (FAMILIES[family].get("num_experts_per_tok") or FAMILIES[family]["moe_k"])
    assert arch.num_groups(config) == (2 if family in GROUPED else 1)


def test_greedy_deepseek_v2_has_no_groups(tiny):
    config = config_of(tiny("deepseek_v2"))
    assert find_architecture(config).num_groups({**config, "topk_method": "greedy"}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_with_expert_count_changes_the_count_alone(family, tiny):
    config = config_of(tiny(family))
    before = json.dumps(config)
    arch = find_architecture(config)
    changed = arch.with_expert_count(config, 4)
    assert json.dumps(config) == before
    assert list(changed) == list(config)
    different = {key for key in config if changed[key] != config[key]}
    assert different
    assert {config[key] for key in different} == {8}
    assert {changed[key] for key in different} == {4}
    assert arch.num_experts(changed) == 4
    assert arch.top_k(changed) == arch.top_k(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_lowers_top_k_and_groups(family, tiny):
    config = config_of(tiny(family))
    arch = find_architecture(config)
    changed = arch.with_expert_count(config, 1)
    assert (arch.num_experts(changed), arch.top_k(changed), arch.num_groups(changed)) == (1, 1, 1)


def legal_by_brute_force(family: str, config: dict, target: int) -> bool:
    top_k = FAMILIES[family].get("num_experts_per_tok") or FAMILIES[family]["moe_k"]
    if target == 1:
        return family not in (*TWO_PER_GROUP, "phimoe", "flex_olmo")
    if family in GROUPED:
        per_group = target // 2
        # The single chosen group must hold top-k experts, and DeepSeek-V3 scores a group by its best two.
        return target % 2 == 0 and per_group * config["topk_group"] >= top_k and per_group >= 2 and target <= 8
    return top_k <= target <= 8


@pytest.mark.parametrize("family", FAMILIES)
def test_legal_expert_counts(family, tiny):
    config = config_of(tiny(family))
    arch = find_architecture(config)
    for target in range(-1, 11):
        legal = target > 0 and legal_by_brute_force(family, config, target)
        if legal:
            arch.check_expert_count(config, target)
        else:
            with pytest.raises(UserError, match=f"`to` {target}"):
                arch.check_expert_count(config, target, option="`to`")


def test_both_groups_chosen_need_fewer_experts_each(tiny):
    config = {**config_of(tiny("deepseek_v3")), "topk_group": 2}
    arch = find_architecture(config)
    arch.check_expert_count(config, 4)
    with pytest.raises(UserError, match="breaks the router's 2 groups") as caught:
        arch.check_expert_count(config, 5)
    assert caught.value.hint == "legal targets: 4, 6, 8"


def test_configs_without_type_or_experts():
    with pytest.raises(UnsupportedModelError, match="no model_type"):
        find_architecture({"num_experts": 4})
    with pytest.raises(UnsupportedModelError, match="'gpt2' is not a Mixture-of-Experts"):
        find_architecture({"model_type": "gpt2"})
    with pytest.raises(UnsupportedModelError, match="counts no experts"):
        find_architecture({"model_type": "mixtral", "num_local_experts": None})
    assert find_architecture({"model_type": "new_moe", "n_routed_experts": 3}).num_experts({"n_routed_experts": 3}) == 3
    assert find_architecture({"model_type": "base", "num_experts": 2}).model_type == "base"
