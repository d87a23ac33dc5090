"""Whether a MoE family can be a dense one by its own config: found out by building it so, without weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moetools.architectures.dense import OWN_KEYS, DenseFamily

_OTHER_WIDTH = 8


def own_dense(
    config: Mapping[str, Any],
    text: Any,
    at: tuple[str, ...],
    build: Callable[[Mapping[str, Any]], Any],
    model: Any,
    layers: str,
    ffns: Sequence[str],
    experts: Any,
) -> DenseFamily | None:
    """The family as its own dense counterpart; None where its config cannot make every layer dense.

    Built so, every layer has a gated FFN of `intermediate_size` without biases in the place of the MoE block, with the
    experts' activation, and everything else has the parameters and settings that it had.

    Args:
        config, text, at: config.json, its text model's part as transformers reads it, and the keys that lead there.
        build: makes the model of a config.json without weights.
        model: the MoE model.
        layers: path of the decoder layers.
        ffns: path of every layer's FFN or MoE block, inside the layer.
        experts: module of one block's experts.
    """
    keys = tuple(key for key in OWN_KEYS if hasattr(text, key))
    width = getattr(text, "intermediate_size", None)
    if not keys or not isinstance(width, int) or set(ffns) != {"mlp"}:
        return None
    family = DenseFamily(own_keys=keys, at=at)
    count = len(ffns)
    try:
        dense = build(family.config(config, {}, width=width + _OTHER_WIDTH, layers=range(count)))
    except (ValueError, TypeError, AttributeError, KeyError, IndexError):
        return None
    prefixes = tuple(f"{layers}.{index}.mlp." for index in range(count))
    found, before = (
        {name: tuple(one.shape) for name, one in side.state_dict().items() if not name.startswith(prefixes)}
        for side in (dense, model)
    )
    made = [dense.get_submodule(prefix.removesuffix(".")) for prefix in prefixes]
    inward, outward = (width + _OTHER_WIDTH, text.hidden_size), (text.hidden_size, width + _OTHER_WIDTH)
    wanted = {"gate_proj": inward, "up_proj": inward, "down_proj": outward}
    gated = all(_shapes(ffn) == wanted for ffn in made) and _same_activation(made[0], experts)
    beside = (_settings(side.get_submodule(layers)) for side in (dense, model))
    return family if found == before and gated and next(beside) == next(beside) else None


def _shapes(ffn: Any) -> dict[str, tuple[int, ...]]:
    return {name.removesuffix(".weight"): tuple(one.shape) for name, one in ffn.state_dict().items()}


def _settings(layers: Any) -> dict[str, dict[str, Any]]:
    """What the modules beside the FFNs note of themselves: some families' attention depends on what the FFN is."""
    plain = (bool, int, float, str, tuple)
    return {
        name: {key: value for key, value in vars(module).items() if isinstance(value, plain)}
        for name, module in layers.named_modules()
        if ".mlp." not in f".{name}."
    }


def _same_activation(ffn: Any, experts: Any) -> bool:
    one, other = (getattr(module, "act_fn", None) for module in (ffn, experts))
    return type(one) is type(other) and getattr(one, "__name__", "") == getattr(other, "__name__", "")
