"""What a checkpoint is, from config.json and safetensors headers alone: no weight is read, no torch is imported."""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetools.architectures.base import Architecture, find_architecture, first_present
from moetools.architectures.config_check import check_config, check_sizes
from moetools.architectures.kv_cache import kv_cache_bytes
from moetools.checkpoint.reader import Checkpoint, TensorInfo, open_checkpoint
from moetools.errors import CheckpointError
from moetools.formats.reader import with_known_config
from moetools.plugins import plugin_names
from moetools.verbs.inspect.summary import ModelSummary, Size

_EXPERT = re.compile(r"\.experts\.(?:expert_)?(\d+)\.")
_INDEX = re.compile(r"\.\d+\.")
_SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_CONTEXT = 1000
_QUANTIZABLE = ("experts", "shared experts", "attention", "dense mlp")
_SERVING_BITS = {"fp32": (32, 32), "bf16": (16, 16), "int8": (8, 16), "int4": (4, 16)}
"""Bits per parameter of the linear layers in `_QUANTIZABLE`, and of everything else."""


def inspect(model: Path) -> ModelSummary:
    """Summarise the checkpoint in the folder `model` without reading any weight.

    Raises:
        CheckpointError: the folder cannot be used, or config.json contradicts the tensors; both values are named.
        UnsupportedModelError: config.json names no family.
    """
    disk = with_known_config(open_checkpoint(model))
    check_config(disk.config, disk.path / "config.json")
    quantization = _quantization(disk.config)
    checkpoint, stored = disk if quantization is None else _decoded(disk), disk.tensors
    config = checkpoint.config
    arch = find_architecture(config, dense=True)
    text = arch.text(config)
    extra = {name for name in checkpoint.tensors if arch.is_extra(name, config)}
    tensors = [info for name, info in checkpoint.tensors.items() if name not in extra]
    by_part = _group(tensors, _part_lookup(arch))
    decoded = not config.get("quantization_config")
    facts = _Facts(checkpoint, arch, tensors, by_part.get("experts", []), packed=not decoded)
    check_sizes(config, arch, checkpoint.tensors, checkpoint.path)
    parts = {part: _size(infos) for part, infos in by_part.items()}
    return ModelSummary(
        path=str(checkpoint.path),
        model_type=arch.model_type,
        described=facts.described,
        scoring=arch.scoring if facts.described else None,
        layers=facts.layers,
        moe_layers=facts.moe_layers,
        experts=facts.experts,
        top_k=facts.top_k,
        groups=arch.num_groups(config),
        shared_experts=_shared_experts(text, parts),
        expert_width=facts.expert_width,
        hidden_size=facts.hidden_size,
        parts=parts,
        dtypes={
            dtype: _size(infos)
            for dtype, infos in _group(
                [info for name, info in stored.items() if name not in extra], lambda info: info.dtype
            ).items()
        },
        extra=_size([checkpoint.tensors[name] for name in extra]),
        active_parameters=_active(parts, facts.experts, facts.top_k),
        files=len(checkpoint.headers),
        file_bytes=sum(header.file_bytes for header in checkpoint.headers.values()),
        quantization=quantization,
        decoded=decoded,
        serving_bytes=_serving_bytes(parts, packed=quantization is not None),
        kv_cache_bytes=kv_cache_bytes(text, facts.layers, _CONTEXT),
    )


def _decoded(disk: Checkpoint) -> Checkpoint:
    """Packed weights as the tensors they stand for, with their bytes on disk; as they are where that is not known."""
    from moetools.formats.base import UnknownPackingError
    from moetools.formats.reader import packed_view

    try:
        view = packed_view(disk)
    except UnknownPackingError:
        return disk
    stored = {name: replace(info, nbytes=view.stored_bytes(name)) for name, info in view.tensors.items()}
    return replace(view, tensors=stored)


class _Facts:
    """What config.json says and the tensors confirm; the constructor raises `CheckpointError` where they disagree."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        arch: Architecture,
        tensors: list[TensorInfo],
        experts: list[TensorInfo],
        *,
        packed: bool,
    ) -> None:
        self._arch = arch
        self._checkpoint, self._config = checkpoint, arch.text(checkpoint.config)
        self.described = arch.model_type.replace("_", "-") in plugin_names("moetools.architectures.families")
        dense = arch.num_experts(checkpoint.config) is None
        # A problem is there only where config.json speaks of experts.
        uncounted = None if dense and arch.problem is not None else 0
        self.experts = uncounted if dense else self._number(arch.count_keys) or 0
        self.top_k = None if dense else self._number(arch.top_k_keys) or arch.fixed_top_k
        self.expert_width = self._number(("intermediate_size",) if dense else arch.width_keys)
        self.hidden_size = self._number(("hidden_size", "d_model") if arch.stacks else ("hidden_size",))
        self.layers = self._check_layers(tensors)
        self.moe_layers = self._check_experts(experts, self._key(arch.count_keys))
        if self.experts and self.top_k is not None and self.top_k > self.experts:
            self._refuse(f"{self._key(arch.top_k_keys)} {self.top_k}", f"there are only {self.experts} experts")
        if self.described and not packed:
            self._check_shapes(tensors, experts, self._key(arch.width_keys))

    def _key(self, keys: tuple[str, ...]) -> str:
        return next((key for key in keys if self._config.get(key) is not None), keys[0])

    def _check_layers(self, tensors: list[TensorInfo]) -> int:
        found = {
            layer for info in tensors if (layer := self._arch.layer_of(info.name, self._checkpoint.config)) is not None
        }
        for key in [key for _, key in self._arch.stacks] or ["num_hidden_layers"]:
            self._number((key,))
        stated = self._arch.num_layers(self._checkpoint.config)
        if stated is None and not found:
            return self._number(("n_layers", "num_layers")) or 0
        layers = stated if stated is not None else max(found, default=-1) + 1
        missing = next(layer for layer in itertools.count() if layer not in found)
        if missing < layers:
            keys = " + ".join(key for _, key in self._arch.stacks) or "num_hidden_layers"
            self._refuse(f"{keys} {layers}", f"{len(found)} layers are on disk; layer {missing} is not")
        return layers

    def _check_experts(self, experts: list[TensorInfo], key: str) -> tuple[int, ...]:
        """Indices of the layers with experts, each of which must have as many as config.json says."""
        numbered: dict[int, set[int]] = {}
        fused: dict[int, int] = {}
        for info in experts:
            layer = self._arch.layer_of(info.name, self._checkpoint.config)
            index = _EXPERT.search(info.name)
            if layer is not None and index:
                numbered.setdefault(layer, set()).add(int(index[1]))
            elif layer is not None and len(info.shape) > 1:
                # Fused: the first dimension counts the experts.
                fused[layer] = max(fused.get(layer, 0), info.shape[0])
        for layer in sorted({*numbered, *fused}):
            found = numbered.get(layer, set())
            count = max(len(found), fused.get(layer, 0))
            if self.experts is not None and (count != self.experts or max(found, default=0) >= self.experts):
                self._refuse(f"{key} {self.experts}", f"layer {layer} has {count} experts on disk")
        if self.experts and not numbered and not fused:
            self._refuse(f"{key} {self.experts}", "no tensor of an expert was found")
        return tuple(sorted({*numbered, *fused}))

    def _check_shapes(self, tensors: list[TensorInfo], experts: list[TensorInfo], width_key: str) -> None:
        hidden, width, vocabulary = self.hidden_size, self.expert_width, self._number(("vocab_size",))
        legal = {hidden, width, 2 * width} if hidden and width else None
        for info in experts:
            dims = info.shape[0 if _EXPERT.search(info.name) else 1 :]
            if legal and not legal.issuperset(dims):
                self._refuse(f"hidden_size {hidden} and {width_key} {width}", f"'{info.name}' is {list(info.shape)}")
        for info in tensors:
            expected = (vocabulary, hidden)
            if info.name.endswith("embed_tokens.weight") and None not in expected and info.shape != expected:
                self._refuse(
                    f"vocab_size {vocabulary} and hidden_size {hidden}", f"'{info.name}' is {list(info.shape)}"
                )

    def _number(self, keys: tuple[str, ...]) -> int | None:
        """Value of the first of `keys` that config.json has, which must be a positive whole number."""
        key = next((key for key in keys if self._config.get(key) is not None), None)
        if key is None:
            return None
        value = first_present(self._config, (key,))
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{self._checkpoint.path}: config.json says {key} {value!r}, which is no positive whole number"
            )
        return value

    def _refuse(self, stated: str, found: str) -> None:
        raise CheckpointError(
            f"{self._checkpoint.path}: config.json says {stated}, but {found}",
            hint="config.json and the weights belong to different models, or a file is missing",
        )


def _part_lookup(arch: Architecture) -> Any:
    """`part_of` by tensor, asked once for all layers and experts: large models repeat few names."""
    cached = functools.cache(arch.part_of)
    return lambda info: cached(_INDEX.sub(".0.", info.name))


def _group(tensors: Iterable[TensorInfo], key: Any) -> dict[str, list[TensorInfo]]:
    groups: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        groups.setdefault(key(info), []).append(info)
    return groups


def _size(tensors: list[TensorInfo]) -> Size:
    return Size(
        tensors=len(tensors),
        parameters=sum(math.prod(info.shape) for info in tensors),
        bytes=sum(info.nbytes for info in tensors),
    )


def _shared_experts(config: Mapping[str, Any], parts: Mapping[str, Size]) -> int:
    """Shared experts of a layer; 1 where tensors of one exist and config.json does not count them (Qwen2-MoE)."""
    if "shared experts" not in parts:
        return 0
    return first_present(config, _SHARED_KEYS) or 1


def _active(parts: Mapping[str, Size], experts: int | None, top_k: int | None) -> int | None:
    whole = sum(size.parameters for size in parts.values())
    if experts == 0:
        return whole
    if experts is None or top_k is None:
        return None
    routed = parts["experts"].parameters
    return whole - routed + routed * top_k // experts


def _serving_bytes(parts: Mapping[str, Size], *, packed: bool) -> dict[str, int]:
    if packed:
        return {"as stored": sum(size.bytes for size in parts.values())}
    linear = sum(size.parameters for part, size in parts.items() if part in _QUANTIZABLE)
    rest = sum(size.parameters for size in parts.values()) - linear
    return {dtype: math.ceil((linear * bits + rest * other) / 8) for dtype, (bits, other) in _SERVING_BITS.items()}


def _quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Method, format and bits of `quantization_config`, as far as it names them."""
    stated = config.get("quantization_config")
    if not isinstance(stated, dict):
        return None
    weights = [group.get("weights") or {} for group in (stated.get("config_groups") or {}).values()]
    bits = sorted({entry["num_bits"] for entry in weights if entry.get("num_bits")})
    found = {
        "method": stated.get("quant_method", "unknown"),
        "format": stated.get("format") or stated.get("fmt"),
        "bits": stated.get("bits") or (bits[0] if len(bits) == 1 else bits or None),
    }
    return {key: value for key, value in found.items() if value is not None}
