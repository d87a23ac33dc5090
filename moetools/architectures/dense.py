"""The dense model that a Mixture-of-Experts model becomes when every MoE block is replaced by one FFN."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class DenseFamily:
    """A family whose decoder layers compute exactly what the MoE family's do, but with a dense FFN.

    Its FFN is `mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x))` without biases, its width `intermediate_size`;
    every other tensor has the same name and meaning in both families.

    Attributes:
        model_type, class_name: what the student's config.json says; None where the MoE family has dense layers of its
            own and `first_dense_key` makes all of them dense.
        first_dense_key: config key that counts the layers at the front that are dense.
    """

    model_type: str | None = None
    class_name: str | None = None
    first_dense_key: str | None = None

    MOE_KEY: ClassVar[re.Pattern[str]] = re.compile(
        "expert|moe_|router|topk|routed|n_group|first_k_dense|decoder_sparse|mlp_only|^aux_|seq_aux|scoring_func|ep_size"
    )
    """Keys that mean nothing to a dense model; dropped when the model type changes."""

    def is_all_dense(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json of the MoE family itself makes every layer dense."""
        if self.first_dense_key is None:
            return False
        return (config.get(self.first_dense_key) or 0) >= config.get("num_hidden_layers", float("inf"))

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
        kept = {key: value for key, value in config.items() if self.model_type is None or not self.MOE_KEY.search(key)}
        result = {**kept, **({} if self.model_type is None else effective)}
        if self.model_type is not None:
            result |= {"architectures": [self.class_name], "model_type": self.model_type}
        if self.first_dense_key is not None:
            result[self.first_dense_key] = len(layers)
        return with_layers(result, layers) | {"intermediate_size": width}


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
