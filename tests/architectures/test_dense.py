"""config.json of a dense student."""

from moetools.architectures.base import find_architecture
from moetools.architectures.dense import DenseFamily, both_spellings, with_layers

MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.1,
    "num_hidden_layers": 4,
    "rope_theta": 5.0,
    "torch_dtype": "bfloat16",
}


def test_a_dense_familys_config_knows_no_experts() -> None:
    family = find_architecture(MIXTRAL).dense
    assert family is not None
    found = family.config(MIXTRAL, {"sliding_window": None, "rope_theta": 5.0}, width=24, layers=[0, 2])
    assert found == {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "rope_theta": 5.0,
        "torch_dtype": "bfloat16",
        "sliding_window": None,
    }


def test_a_family_with_dense_layers_changes_only_what_makes_all_of_them_dense() -> None:
    family = DenseFamily(own_keys=("first_k_dense_replace",))
    config = {"model_type": "deepseek_v3", "n_routed_experts": 8, "first_k_dense_replace": 1, "num_hidden_layers": 3}
    found = family.config({**config, "num_nextn_predict_layers": 1}, {}, width=24, layers=range(3))
    assert found == {**config, "first_k_dense_replace": 3, "num_nextn_predict_layers": 0, "intermediate_size": 24}
    assert not family.is_all_dense(config)
    assert family.is_all_dense(found)
    assert find_architecture({**found}, dense=True).num_experts(found) is None


def test_kept_layers_keep_their_kind() -> None:
    config = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "auto_map": {}}
    assert with_layers(config, [0, 2]) == {"num_hidden_layers": 2, "layer_types": ["a", "c"]}


def test_rotary_parameters_and_dtype_in_both_spellings() -> None:
    old = both_spellings({"rope_theta": 5.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "torch_dtype": "x"})
    assert old["rope_parameters"] == {"rope_theta": 5.0, "rope_type": "yarn", "factor": 2.0}
    assert old["dtype"] == old["torch_dtype"] == "x"
    new = both_spellings({"rope_parameters": {"rope_theta": 5.0, "rope_type": "yarn", "factor": 2.0}})
    assert new["rope_theta"] == 5.0
    assert new["rope_scaling"] == {"rope_type": "yarn", "factor": 2.0}
    plain = both_spellings({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}})
    assert plain["rope_theta"] == 5.0
    assert "rope_scaling" not in plain
