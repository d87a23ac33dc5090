"""A bridge to transformers: its own reading of config.json, the class it builds, and the names it writes.

Imports torch and transformers, so it is itself imported only where a model is built.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from moetools.architectures.attention import with_own_attention
from moetools.errors import MoetoolsError, UnsupportedModelError

_SPECIAL_FLOAT = "__float__"


def stock_class(parsed: Any) -> Any:
    """The class that `architectures` names if it generates text, else the one that picks it by the config."""
    named = (getattr(transformers, str(name), None) for name in parsed.architectures or ())
    chosen: Any = next((one for one in named if isinstance(one, type) and issubclass(one, GenerationMixin)), None)
    if chosen is not None and isinstance(parsed, chosen.config_class):
        return chosen
    return AutoModelForSeq2SeqLM if parsed.is_encoder_decoder else AutoModelForCausalLM


def from_config(parsed: Any, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """A model of its class with random weights, or with none under `torch.device("meta")`."""
    chosen = stock_class(parsed)
    if chosen in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        return chosen.from_config(parsed, dtype=dtype, trust_remote_code=trust_remote_code)
    return chosen._from_config(parsed, dtype=dtype)


def stock_config(config: Mapping[str, Any], path: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """transformers' own reading of config.json.

    Raises:
        UnsupportedModelError: the model type needs custom code (and it was not allowed), or is unknown, or is
            already quantized.
    """
    model_type = config.get("model_type", "")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"{path} is already quantized ({method}) and was opened as plain weights",
            hint="write the plain checkpoint: `moetools.quantize('MODEL', 'OUT', expand=True)`",
        )
    if not trust_remote_code:
        config = with_own_attention(config)
    if model_type in transformers.CONFIG_MAPPING:
        with construction(path):
            return transformers.CONFIG_MAPPING[model_type].from_dict(_with_floats(config))
    if "auto_map" in config:
        if not trust_remote_code:
            raise UnsupportedModelError(
                f"{path} needs its own Python code to run (auto_map in config.json)",
                hint="read that code, then give `trust_remote_code` if you trust it",
            )
        with construction(path):
            return AutoConfig.from_pretrained(path, trust_remote_code=True, local_files_only=True)
    raise UnsupportedModelError(
        f"transformers {transformers.__version__} knows no model_type '{model_type}'",
        hint="a newer transformers may know it",
    )


@contextlib.contextmanager
def construction(path: Path) -> Iterator[None]:
    """Whatever transformers, or a checkpoint's own code, raises over a config.json becomes one line here.

    Raises:
        UnsupportedModelError: the first line of what was raised.
    """
    try:
        yield
    except (MoetoolsError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # foreign code: a config.json may make it raise anything
        raise UnsupportedModelError(
            f"{path}: transformers {transformers.__version__} cannot build a causal language model from this "
            f"config.json: {type(error).__name__}: {first_line(error)}"
        ) from error


def _with_floats(value: Any) -> Any:
    """JSON has no infinity: transformers saves {"__float__": "Infinity"} in its place."""
    if isinstance(value, Mapping):
        if value.keys() == {_SPECIAL_FLOAT}:
            return float(value[_SPECIAL_FLOAT])
        return {key: _with_floats(inner) for key, inner in value.items()}
    return [_with_floats(inner) for inner in value] if isinstance(value, list) else value


def effective_config(config: Mapping[str, Any], path: Path, model_type: str) -> dict[str, Any]:
    """What config.json means, defaults included, as far as models of `model_type` know the key.

    Left out are keys whose value is that family's default anyway, unless config.json has them.
    """
    meant = stock_config(config, path).to_dict()
    known = transformers.CONFIG_MAPPING[model_type]().to_dict()
    shared = known.keys() & meant.keys() - {"_name_or_path", "architectures", "model_type", "transformers_version"}
    result = {key: meant[key] for key in sorted(shared) if key in config or meant[key] != known[key]}
    if "layer_types" in known and meant.get("sliding_window") and "layer_types" not in meant:
        # A family without kinds of layers has its window in all of them.
        result["layer_types"] = ["sliding_attention"] * meant["num_hidden_layers"]
    if "head_dim" in known:
        result["head_dim"] = meant.get("head_dim") or meant["hidden_size"] // meant["num_attention_heads"]
    return result


def disk_names(model: Any, name: str, tensor: Tensor) -> list[str]:
    """Names on disk of a tensor of the model, as a checkpoint that stock saves has them."""
    return sorted(revert_weight_conversion(model, {name: tensor}))


def decoder_path(model: Any, model_type: str) -> str:
    """Path of the module that embeds tokens and owns the decoder layers."""
    embeddings = model.get_input_embeddings()
    for name, module in model.named_modules():
        if embeddings in module.children() and isinstance(getattr(module, "layers", None), nn.ModuleList):
            return name
    raise UnsupportedModelError(
        f"model_type '{model_type}': no decoder was found that embeds tokens and has layers",
        hint="decoders of the usual form can be handled, encoder-decoder models and other forms cannot",
    )


def uses_experts_interface(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("num_experts", "is_transposed", "_apply_gate", "down_proj"))


def first_line(error: BaseException) -> str:
    if isinstance(error, StrictDataclassError):
        # Its first line names the key, the second what is wrong with it.
        return " ".join(str(error).split())
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
