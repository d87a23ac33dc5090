"""Loads moetools' own packed checkpoints with transformers.

    import moetools.hf
    model = AutoModelForCausalLM.from_pretrained("OUT")             # dequantized: a plain model in memory
    model = moetools.hf.quantizer.load_packed("OUT")                # routed experts stay packed, decoded when used

Importing this registers the quantizer for `quant_method: moetools`. transformers builds the model, and the tensors come
through `moetools.formats.reader`, which decodes one at a time and checks every checksum.
"""

import contextvars
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moetools.errors import UnsupportedModelError
from moetools.formats.base import Layout, Packed
from moetools.formats.layouts.moetools import METHOD, PAYLOADS
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.forward.conversion import load_into
from moetools.plugins import plugin_names

_ROLES = {
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3"),
    "down": ("down_proj", "w2"),
}
_EXPERT = re.compile(r"layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.weight$")
_AT_ONCE = 8
"""Experts that are decoded together; streams of an entropy code decode much faster so."""
_keep_packed: contextvars.ContextVar[bool] = contextvars.ContextVar("moetools_keep_packed", default=False)


def load_packed(path: Path | str, **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained` with routed experts that stay packed in memory.

    An expert's matrices are decoded whenever tokens are routed to it and dropped again; everything else is dequantized.

    Raises:
        UnsupportedModelError: a family that keeps all experts of a layer in one tensor.
    """
    token = _keep_packed.set(True)
    try:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    finally:
        _keep_packed.reset(token)


@register_quantization_config(METHOD)
class MoetoolsConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json; what it says is read by `moetools.formats`."""

    def __init__(self, version: int = 1, groups: list[dict[str, Any]] | None = None, **_: Any) -> None:
        self.quant_method = METHOD
        self.version, self.groups = version, groups or []
        self.dequantize = not _keep_packed.get()


@register_quantizer(METHOD)
class MoetoolsQuantizer(HfQuantizer):
    """Fills a stock model from a packed checkpoint, after transformers has filled what is not packed."""

    requires_calibration = False

    def __init__(self, quantization_config: MoetoolsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._view: PackedCheckpoint
        self._experts: dict[str, PackedExperts] = {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        view = open_model(Path(kwargs["checkpoint_files"][0]).parent)
        assert isinstance(view, PackedCheckpoint)
        self._view = view
        if _keep_packed.get():
            self._experts = _replace_experts(model, view)
        # Packed tensors are neither missing nor unexpected: they come below, and `load_into` misses none.
        kinds = "|".join(plugin_names(PAYLOADS)).replace("-", "_")
        ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), rf"_({kinds})(_transposed)?(\.\d+)?$"}
        model._keys_to_ignore_on_load_unexpected = ignored
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), ".*"}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        held = {one.name for experts in self._experts.values() for one in experts.packed.values()}
        device, dtype = model.get_input_embeddings().weight.device, model.config.dtype
        load_into(model, self._view.slices(set(self._view.tensors) - held), device=device, dtype=dtype)
        for experts in self._experts.values():
            experts.fill(self._view, device)
        for attribute in ("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing"):
            model.__dict__.pop(attribute, None)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """A model whose experts are packed cannot be saved; a dequantized one is a plain model."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class PackedExperts(nn.Module):
    """The experts of one layer as bytes; takes the place of transformers' experts module.

    f_e(x) = down_e @ (act(gate_e @ x) * (up_e @ x)), with the three matrices decoded for the tokens of expert e.

    Attributes:
        packed: (expert, role) -> its tensor on disk.
    """

    def __init__(self, experts: Any, layout: Layout, packed: Mapping[tuple[int, str], Packed]) -> None:
        super().__init__()
        # Not its module, only its function: its own weights stay on the meta device.
        self._apply_gate: Callable[[Tensor], Tensor] = experts._apply_gate
        self.layout, self.packed = layout, dict(packed)
        self.num_experts = 1 + max(expert for expert, _ in self.packed)

    def fill(self, view: PackedCheckpoint, device: torch.device) -> None:
        """Take the bytes from disk; each stream's checksum is checked by decoding it once."""
        tensors = view.disk.read(disk for packed in self.packed.values() for disk in packed.parts.values())
        self.layout.read_many(list(self.packed.values()), tensors)
        for key, packed in self.packed.items():
            for number, disk in enumerate(packed.parts.values()):
                self.register_buffer(_buffer(key, number), tensors[disk].to(device), persistent=False)

    def matrices(self, keys: Sequence[tuple[int, str]], dtype: torch.dtype) -> dict[tuple[int, str], Tensor]:
        """[O, I] weights of some (expert, role), decoded together."""
        packed = [self.packed[key] for key in keys]
        streams = {
            disk: getattr(self, _buffer(key, number))
            for key, one in zip(keys, packed, strict=True)
            for number, disk in enumerate(one.parts.values())
        }
        decoded = self.layout.read_many(packed, streams)
        return {key: weight.to(dtype) for key, weight in zip(keys, decoded, strict=True)}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total_TD = torch.zeros_like(hidden_states)
        used = [expert for expert in top_k_index.unique().tolist() if expert < self.num_experts]
        for start in range(0, len(used), _AT_ONCE):
            experts = used[start : start + _AT_ONCE]
            weights = self.matrices([(expert, role) for expert in experts for role in _ROLES], hidden_states.dtype)
            for expert in experts:
                gate, up, down = (weights.pop((expert, role)) for role in ("gate", "up", "down"))
                token_S, place_S = torch.where(top_k_index == expert)
                inner = self._apply_gate(nn.functional.linear(hidden_states[token_S], torch.cat([gate, up])))
                output = nn.functional.linear(inner, down) * top_k_weights[token_S, place_S, None]
                total_TD.index_add_(0, token_S, output.to(total_TD.dtype))
        return total_TD


def _buffer(key: tuple[int, str], number: int) -> str:
    expert, role = key
    return f"{role}_{expert}_{number}"


def _replace_experts(model: Any, view: PackedCheckpoint) -> dict[str, PackedExperts]:
    layers: dict[int, dict[tuple[int, str], Packed]] = {}
    for name, packed in view.packed.items():
        found = _EXPERT.search(name)
        role = next((role for role, names in _ROLES.items() if found and found[3] in names), None)
        if found and role:
            layers.setdefault(int(found[1]), {})[int(found[2]), role] = packed
    replaced = {}
    for path, module in list(model.named_modules()):
        found = re.search(r"layers\.(\d+)\..*experts$", path)
        packed_here = layers.get(int(found[1])) if found else None
        if packed_here and hasattr(module, "num_experts") and not path.endswith("shared_experts"):
            complete = len(packed_here) == 3 * module.num_experts
            if not complete or module.has_bias or module.is_transposed or not module.has_gate:
                raise UnsupportedModelError(f"the experts of {path} cannot stay packed", hint="load it dequantized")
            replaced[path] = PackedExperts(module, view.layout, packed_here)
            model.set_submodule(path, replaced[path])
    if not replaced:
        raise UnsupportedModelError(f"{view.path}: no layer whose experts can stay packed", hint="load it dequantized")
    return replaced
