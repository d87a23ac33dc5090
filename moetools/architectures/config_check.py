"""What config.json may say: types and ranges of every key that is read here, and its sizes beside those of the tensors.

A value of a wrong type, or a model that the tensors cannot fill, is refused before anything is built from it. Keys that
only transformers reads are checked there.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from moetools.errors import CheckpointError

if TYPE_CHECKING:
    from moetools.architectures.base import Architecture
    from moetools.checkpoint.headers import TensorInfo

EXPERTS_PER_LAYER = "moetools_experts_per_layer"
"""Of a config.json whose layers have different numbers of experts; see `moetools.forward.uneven`."""
LARGEST = 2**31 - 1
"""Of any size or number that config.json may hold."""
_HINT = "config.json is damaged, or made for another program; download it again"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_OWN_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_PREDICTS_MORE = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head|mtp\w*)\.")
"""Tensors of a layer for multi-token prediction, which stands behind the decoder's own layers."""

Rule = tuple[str, Callable[[Any], bool]]


def _whole(low: int) -> Rule:
    # type() and not isinstance(): JSON's true is an int for isinstance.
    return f"a whole number from {low} to {LARGEST}", lambda value: type(value) is int and low <= value <= LARGEST


def _list_of(rule: Rule) -> Rule:
    name, legal = rule
    return f"a list, each {name}", lambda value: isinstance(value, list) and all(map(legal, value))


def _or(rule: Rule, other: Rule) -> Rule:
    return f"{rule[0]}, or {other[0]}", lambda value: rule[1](value) or other[1](value)


_SIZE, _COUNT, _ID = _whole(1), _whole(0), _whole(-1)
_TEXT: Rule = ("text", lambda value: isinstance(value, str))
_OBJECT: Rule = ("an object", lambda value: isinstance(value, dict))
_FLAG: Rule = ("true or false", lambda value: isinstance(value, bool))
_FINITE: Rule = (
    "a finite number",
    lambda value: type(value) in (int, float) and abs(value) <= 1e300 and math.isfinite(value),
)
_POSITIVE: Rule = ("a finite number above 0", lambda value: _FINITE[1](value) and value > 0)
_NEVER_NULL = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings",
         "num_key_value_heads", "decoder_sparse_step", "moe_layer_interval"), _SIZE),
    **dict.fromkeys(
        ("shared_expert_intermediate_size", "n_group", "topk_group", "first_k_dense_replace", "n_shared_experts",
         "num_shared_experts", "moe_num_shared_experts", "num_nextn_predict_layers", "kv_lora_rank", "q_lora_rank",
         "head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "max_window_layers",
         "moe_layer_start_index"), _COUNT),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "sliding_window", "moe_layer_end_index"), _ID),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok", "moe_k",
         "moe_topk", "top_k", "experts_per_token", "moe_intermediate_size", "intermediate_size"),
        _or(_COUNT, _list_of(_COUNT))),
    "rope_theta": _POSITIVE,
    "eos_token_id": _or(_ID, _list_of(_ID)),
    **dict.fromkeys(
        ("rms_norm_eps", "initializer_range", "router_aux_loss_coef", "routed_scaling_factor",
         "attention_dropout", "router_jitter_noise", "input_jitter_noise", "embedding_multiplier", "logits_scaling",
         "residual_multiplier", "attention_multiplier", "partial_rotary_factor"), _FINITE),
    **dict.fromkeys(("tie_word_embeddings", "norm_topk_prob", "use_sliding_window", "attention_bias"), _FLAG),
    **dict.fromkeys(("model_type", "topk_method", "scoring_func", "dtype", "torch_dtype", "hidden_act"), _TEXT),
    **dict.fromkeys(("layer_types", "architectures"), _list_of(_TEXT)),
    "mlp_only_layers": _list_of(_COUNT),
    EXPERTS_PER_LAYER: ("an object of whole numbers above 0 by layer", lambda value: _by_layer(value)),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "auto_map", "text_config", "quantization_config"), _OBJECT),
}  # fmt: skip
_PACKING: dict[str, Rule] = {
    **dict.fromkeys(("quant_method", "format", "fmt"), _TEXT),
    "config_groups": ("an object of groups, each with targets and weights", lambda value: _groups(value)),
    "ignore": _list_of(_TEXT),
    "weight_block_size": _list_of(_SIZE),
    "groups": _list_of(_OBJECT),
}
"""Of `quantization_config`."""
_SCHEME: dict[str, Rule] = {
    "num_bits": _whole(1),
    "group_size": _ID,
    "symmetric": _FLAG,
    **dict.fromkeys(("type", "strategy"), _TEXT),
}
"""Of the `weights` of a group of compressed-tensors."""


def check_config(config: Mapping[str, Any], where: object = "config.json") -> None:
    """Refuse values of wrong types and impossible numbers, in a nested `text_config` and `quantization_config` too.

    Raises:
        CheckpointError: naming the key, the value and what is legal.
    """
    _check(config, _RULES, str(where))
    for key in _NEVER_NULL:
        if key in config and config[key] is None:
            raise CheckpointError(f"{where}: {key} null; legal is {_RULES[key][0]}", hint=_HINT)
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        # Either of all layers, or of every kind of layer.
        for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
            _check(part, {"rope_theta": _POSITIVE, "factor": _POSITIVE}, f"{where}: {key}")
    if config.get("text_config") is not None:
        check_config(config["text_config"], f"{where}: text_config")
    if config.get("quantization_config") is not None:
        _check(config["quantization_config"], _PACKING, f"{where}: quantization_config")


def check_routing(config: Mapping[str, Any], arch: "Architecture") -> None:
    """Refuse a router that chooses more experts than there are, none, or from groups that do not divide them.

    Raises:
        CheckpointError: naming the key's value and the number that it contradicts.
    """
    experts, top_k, groups = arch.num_experts(config), arch.top_k(config), arch.num_groups(config)
    if not experts:
        return
    config = arch.text(config)
    key = next((key for key in arch.top_k_keys if config.get(key) is not None), "")
    if top_k is not None and not 1 <= top_k <= experts:
        most = f"there are only {experts} experts" if top_k else f"every token needs one of the {experts} experts"
        _refuse("the router", f"{key} {top_k}", most)
    chosen = config.get(arch.topk_group_key) or groups
    if groups > 1 and (experts % groups or chosen > groups):
        _refuse("the router", f"{chosen} of {groups} groups", f"{experts} experts do not go into them")


def check_sizes(
    config: Mapping[str, Any], arch: "Architecture", tensors: Mapping[str, "TensorInfo"], where: object
) -> None:
    """Refuse a config.json that promises more layers or experts than there are tensors for, or fewer layers.

    Layers for multi-token prediction may stand behind those that it promises.

    Raises:
        CheckpointError: naming the key's value and what was found.
    """
    layers = {int(one[1]) for name in tensors if (one := _LAYER.search(name))}
    promised = config.get("num_hidden_layers")
    found = len(layers) if layers else len(tensors)
    if promised is not None and promised > found:
        missing = next(layer for layer in itertools.count() if layer not in layers)
        _refuse(where, f"num_hidden_layers {promised}", f"{found} layers are on disk; layer {missing} is not")
    if promised is not None:
        _refuse_more_layers(promised, config, tensors, where)
    experts = arch.num_experts(config)
    if experts:
        most = most_experts(tensors, arch)
        if experts > most:
            _refuse(where, f"{experts} experts", f"no layer has more than {most} on disk")


def most_experts(tensors: Mapping[str, "TensorInfo"], arch: "Architecture") -> int:
    """The largest number of experts that any layer's tensors can hold."""
    most = counted_experts(tensors, arch)
    return most or max((size for info in tensors.values() for size in info.shape), default=0)


def counted_experts(tensors: Mapping[str, "TensorInfo"], arch: "Architecture") -> int:
    """The largest number of experts of a layer among those that are named as such; 0 without any."""
    part_of = functools.cache(arch.part_of)
    most = 0
    for name, info in tensors.items():
        numbered = _EXPERT.search(name)
        if numbered:
            most = max(most, int(numbered[1]) + 1)
        elif len(info.shape) > 1 and 0 not in info.shape and part_of(_NUMBER.sub("0", name)) == "experts":
            # Fused: the first dimension counts the experts.
            most = max(most, info.shape[0])
    return most


def _refuse_more_layers(promised: int, config: Mapping[str, Any], tensors: Iterable[str], where: object) -> None:
    legal = promised + (config.get("num_nextn_predict_layers") or 0)
    found = ((int(one[1]), name) for name in tensors if (one := _OWN_LAYER.match(name)))
    behind = [(layer, name) for layer, name in found if layer >= legal]
    more = {layer for layer, _ in behind} - {layer for layer, name in behind if _PREDICTS_MORE.search(name)}
    if more:
        _refuse(where, f"num_hidden_layers {promised}", f"layer {min(more)} is on disk too")


def _check(values: Mapping[str, Any], rules: Mapping[str, Rule], where: str) -> None:
    for key, (name, legal) in rules.items():
        value = values.get(key)
        if value is not None and not legal(value):
            shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
            raise CheckpointError(f"{where}: {key} {shown}; legal is {name}", hint=_HINT)


def _by_layer(value: Any) -> bool:
    numbers = _whole(1)[1]
    return isinstance(value, dict) and all(
        re.fullmatch(r"\d{1,6}", layer) and numbers(count) for layer, count in value.items()
    )


def _groups(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(group, dict) and _group(group) for group in value.values())


def _group(group: Mapping[str, Any]) -> bool:
    weights = group.get("weights")
    legal_weights = weights is None or (
        isinstance(weights, dict)
        and all(weights.get(key) is None or legal(weights[key]) for key, (_, legal) in _SCHEME.items())
    )
    return legal_weights and _list_of(_TEXT)[1](group.get("targets"))


def _refuse(where: object, stated: str, found: str) -> None:
    raise CheckpointError(
        f"{where}: config.json says {stated}, but {found}",
        hint="config.json and the weights belong to different models, or a file is missing",
    )
