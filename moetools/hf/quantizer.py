"""Loads moetools' own packed checkpoints with transformers.

    import moetools.hf
    model = AutoModelForCausalLM.from_pretrained("OUT")             # dequantized: a plain model in memory
    model = moetools.hf.load_packed("OUT", cache_bytes="2GiB")      # routed experts stay packed, decoded when used

Importing this registers the quantizer for `quant_method: moetools`. transformers builds the model, and the tensors come
through `moetools.formats.reader`, which decodes one at a time and checks every checksum.
"""

import contextvars
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moetools.checkpoint.folder import read_json_object
from moetools.errors import UnsupportedModelError, UserError
from moetools.formats.layouts.moetools import METHOD, PAYLOADS
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.forward.conversion import load_into
from moetools.hf.expert_cache import ExpertCache
from moetools.hf.packed_experts import PackedExperts, replace_experts
from moetools.plugins import plugin_names
from moetools.sizes import parse_bytes

_keep_packed: contextvars.ContextVar[ExpertCache | None] = contextvars.ContextVar("moetools_keep_packed", default=None)


def load_packed(path: Path | str, *, cache_bytes: int | str = 0, **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained` with routed experts that stay packed in memory; everything else is plain.

    An expert's matrices are decoded when tokens are routed to it. The cache keeps those used last, of all layers
    together; `model.moetools_cache` counts its hits and misses.

    Args:
        cache_bytes: what decoded matrices may take in memory, as a number or `"2GiB"`; 0 keeps none.
        options: as `from_pretrained` takes them.

    Raises:
        UnsupportedModelError: not of moetools' own format; no layer's experts are packed; or transformers changes them
            while it loads them.
        UserError: `cache_bytes` is no size.
    """
    most = parse_bytes(cache_bytes) if isinstance(cache_bytes, str) else cache_bytes
    if type(most) is not int or most < 0:
        raise UserError(f"cache_bytes is {most!r}; legal: 0 (nothing is kept) or more, or a size like '2GiB'")
    config = Path(path) / "config.json"
    stated = read_json_object(config).get("quantization_config") if config.is_file() else {"quant_method": METHOD}
    if not isinstance(stated, dict) or stated.get("quant_method") != METHOD:
        hint = "moetools.quantize makes one: `scheme=sub1` or `scheme=mixed`"
        raise UnsupportedModelError(f"{path} is not packed in moetools' own format", hint=hint)
    cache = ExpertCache(most)
    token = _keep_packed.set(cache)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    finally:
        _keep_packed.reset(token)
    model.moetools_cache = cache
    return model


@register_quantization_config(METHOD)
class MoetoolsConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json; what it says is read by `moetools.formats`."""

    def __init__(self, version: int = 1, groups: list[dict[str, Any]] | None = None, **_: Any) -> None:
        self.quant_method = METHOD
        self.version, self.groups = version, groups or []
        self.dequantize = _keep_packed.get() is None


@register_quantizer(METHOD)
class MoetoolsQuantizer(HfQuantizer):
    """Fills a stock model from a packed checkpoint, after transformers has filled what is not packed."""

    requires_calibration = False

    def __init__(self, quantization_config: MoetoolsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._view: PackedCheckpoint
        self._experts: list[PackedExperts] = []

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        view = open_model(Path(kwargs["checkpoint_files"][0]).parent)
        assert isinstance(view, PackedCheckpoint)
        self._view = view
        if _keep_packed.get() is not None:
            self._experts = replace_experts(model, view)
        # Packed tensors are neither missing nor unexpected: they come below, and `load_into` misses none.
        kinds = "|".join(plugin_names(PAYLOADS)).replace("-", "_")
        ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), rf"_({kinds})(_transposed)?(\.\d+)?$"}
        model._keys_to_ignore_on_load_unexpected = ignored
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), ".*"}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        held = {name for experts in self._experts for name in experts.names}
        device, dtype = model.get_input_embeddings().weight.device, model.config.dtype
        load_into(model, self._view.slices(set(self._view.tensors) - held), device=device, dtype=dtype)
        cache = _keep_packed.get()
        for experts in self._experts:
            assert cache is not None
            experts.fill(self._view, device, cache)
        for attribute in ("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing"):
            model.__dict__.pop(attribute, None)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """A model whose experts are packed cannot be saved; a dequantized one is a plain model."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False
