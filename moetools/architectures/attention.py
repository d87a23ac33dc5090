"""What a config.json may choose for running a model: what is built into transformers, never code that it fetches."""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moetools.checkpoint.folder import read_json_object

_LOG = logging.getLogger(__name__)
_BUILT_IN = ("eager", "sdpa")
_NAMES = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_OTHERS = ("experts_implementation", "_experts_implementation", "_experts_implementation_internal")


def with_own_attention(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without names of implementations that are not built in, in nested configs too; says what it drops.

    transformers fetches an attention called `owner/name` as code from the Hugging Face hub.
    """
    result = {key: value for key, value in config.items() if key not in (*_NAMES, *_OTHERS)}
    for key, value in result.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            result[key] = with_own_attention(value)
    wanted = next((config[key] for key in _NAMES if config.get(key) is not None), None)
    if wanted is None:
        return result
    if _is_built_in(wanted):
        return result | {"attn_implementation": wanted}
    _LOG.warning("config.json asks for the attention %r, which is not built in or not installed: not used", wanted)
    return result


def attention_option(path: Path, trust_remote_code: bool) -> dict[str, str]:
    """Options for `from_pretrained` that keep a config.json from choosing an attention that is not built in."""
    config = read_json_object(path / "config.json")
    foreign = any(config.get(key) is not None and not _is_built_in(config[key]) for key in _NAMES)
    return {"attn_implementation": "eager"} if foreign and not trust_remote_code else {}


def without_hindrances(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what keeps stock loaders from running any checkpoint, and says nothing of the weights.

    `return_dict` false: stock models read their own outputs by name. An empty `quantization_config`: which method it
    is is asked of it. Names of expert kernels: they are chosen when a model is loaded, and unknown ones raise.
    """
    result = {key: value for key, value in config.items() if key not in _OTHERS}
    if result.get("return_dict") is False:
        del result["return_dict"]
    if result.get("quantization_config") == {}:
        del result["quantization_config"]
    for key, value in result.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, Mapping):
            result[key] = without_hindrances(value)
    return result


def _is_built_in(name: object) -> bool:
    if name == "flash_attention_2":
        return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    return name in _BUILT_IN
