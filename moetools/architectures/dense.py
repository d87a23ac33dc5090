"""The dense model that a Mixture-of-Experts model becomes when every MoE block is replaced by one FFN."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moetools.architectures.nested import text_part, with_text_part

OWN_KEYS = ("mlp_layer_types", "first_k_dense_replace", "mlp_only_layers", "num_dense_layers")
"""Config keys by which MoE families say which of their layers are dense: names by layer, the first so many, numbers."""


@dataclass(frozen=True, kw_only=True)
class DenseFamily:
    """A family whose decoder layers compute exactly what the MoE family's do, but with a dense FFN.

    Its FFN is `mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x))` without biases, its width `intermediate_size`;
    every other tensor has the same name and meaning in both families.

    Attributes:
        model_type, class_name: what the student's config.json says; None where the MoE family has dense layers of its
            own and `own_keys` make all of them dense.
        own_keys: config keys that say which layers are dense, of those that `dense_value` knows.
        at: keys that lead to the text model's part of config.json.
    """

    model_type: str | None = None
    class_name: str | None = None
    own_keys: tuple[str, ...] = ()
    at: tuple[str, ...] = ()

    MOE_KEY: ClassVar[re.Pattern[str]] = re.compile(
        "expert|moe_|router|topk|routed|n_group|first_k_dense|decoder_sparse|mlp_only|^aux_|seq_aux|scoring_func|ep_size"
    )
    """Keys that mean nothing to a dense model; dropped when the model type changes."""

    def is_all_dense(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json of the MoE family itself makes every layer dense."""
        text = text_part(config, self.at)
        layers, stated = text.get("num_hidden_layers"), [key for key in self.own_keys if text.get(key) is not None]
        if not isinstance(layers, int) or not stated:
            return False
        return all(_says_dense(text[key], dense_value(key, layers)) for key in stated)

    def config(
        self, config: Mapping[str, Any], effective: Mapping[str, Any], *, width: int, layers: Sequence[int]
    ) -> dict[str, Any]:
        """config.json of the student.

        The teacher's own, without what concerns experts, and with every value spelled out for which the two families
        may have different defaults.

        Args:
            config: the teacher's config.json.
            effective: the teacher's values, defaults included, of the keys that the student's family knows.
            width: width of the FFN.
            layers: the teacher's layers that the student keeps.
        """
        if self.model_type is None:
            text = with_layers(text_part(config, self.at), layers)
            text |= {key: dense_value(key, len(layers)) for key in self.own_keys} | {"intermediate_size": width}
            return {key: value for key, value in with_text_part(config, self.at, text).items() if key != "auto_map"}
        kept = {key: value for key, value in config.items() if not self.MOE_KEY.search(key)}
        result = {**kept, **effective, "architectures": [self.class_name], "model_type": self.model_type}
        return with_layers(result, layers) | {"intermediate_size": width}


def dense_value(key: str, layers: int) -> Any:
    """What a config key says of so many layers that are all dense; each is one of `OWN_KEYS`."""
    if key == "mlp_layer_types":
        return ["dense"] * layers
    return list(range(layers)) if key == "mlp_only_layers" else layers


def _says_dense(stated: Any, meant: Any) -> bool:
    return stated >= meant if isinstance(meant, int) and isinstance(stated, int) else stated == meant


def with_layers(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """config.json for the given layers of a model, without those for multi-token prediction."""
    result = {**config, "num_hidden_layers": len(layers)}
    result.pop("auto_map", None)
    if result.get("layer_types"):
        result["layer_types"] = [result["layer_types"][index] for index in layers]
    if "num_nextn_predict_layers" in result:
        result["num_nextn_predict_layers"] = 0
    return result


def both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with rotary parameters and dtype as transformers 5 and as older readers look for them."""
    result = dict(config)
    rope = result.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        result["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            result["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    elif rope is None and result.get("rope_theta") is not None:
        scaling = result.get("rope_scaling") or {"rope_type": "default"}
        result["rope_parameters"] = {"rope_theta": result["rope_theta"], **scaling}
    dtype = result.get("dtype") or result.get("torch_dtype")
    return result if dtype is None else result | {"dtype": dtype, "torch_dtype": dtype}
