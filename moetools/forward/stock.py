"""The bridge to stock transformers: a model on the meta device whose layers are filled from disk and freed on demand.

How tensors are renamed, fused and parted again is transformers' own code, called in `forward/conversion.py`.
"""

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moetools.architectures.base import Architecture
from moetools.architectures.building import construction
from moetools.architectures.config_check import check_sizes
from moetools.architectures.weights import LayerWeights, extract, insert
from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.errors import CheckpointError
from moetools.forward.building import MoeLayer, empty_model, find_layers
from moetools.forward.conversion import convert, name_some, names_in_model, revert
from moetools.forward.expert_tensors import ExpertTensor, NumberedExperts
from moetools.forward.finite import refuse_integers, refuse_weights
from moetools.forward.stacks import stack_flow
from moetools.forward.trial import LayerFlow, try_layers
from moetools.forward.wrappers import headless_hint, wrapper_hint

_ROWS = 4096
LAYER_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class StockModel:
    """A stock causal language model without weights, and the way to give some of its modules theirs.

    Attributes:
        model: the transformers model; every parameter starts on the meta device.
        decoder: the module that owns the decoder layers.
        moe_layers: layer index -> `MoeLayer`, for the layers that have routed experts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        arch: Architecture,
        *,
        dtype: torch.dtype,
        device: torch.device,
        config: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint, self.arch, self.dtype, self.device = checkpoint, arch, dtype, device
        self.raw_config = dict(config or checkpoint.config)
        if config is None and not checkpoint.partial:
            check_sizes(self.raw_config, arch, checkpoint.tensors, checkpoint.path)
        self.model = empty_model(self.raw_config, checkpoint.path, dtype, trust_remote_code)
        self._conversions: dict[int | None, list[Any]] = {}
        self._floats = {name for name, tensor in self.model.state_dict().items() if tensor.is_floating_point()}
        self._judged: set[int] = set()
        self._load_lock = threading.Lock()
        self.decoder_path, self.moe_layers = find_layers(self.model, arch, self.raw_config)
        self.decoder: Any = self.model.get_submodule(self.decoder_path)
        self.stacks = [path for path, _ in arch.stacks] or [f"{self.decoder_path}.layers".lstrip(".")]
        self.layer_paths = [f"{path}.{place}" for path in self.stacks for place in range(self._depth(path))]
        self._prefixes = tuple(f"{path}." for path in self.stacks)
        self.num_layers = len(self.layer_paths)
        self.flow = stack_flow(self) if arch.stacks else _flow(self.model, self.decoder_path, self.raw_config)
        self.extra_names: list[str] = []
        self.names = self._names_by_layer()
        self._untie()

    def _names_by_layer(self) -> dict[int | None, list[str]]:
        """Names on disk by decoder layer, None for those outside; what stock does not load goes to `extra_names`.

        That is also what lies beside the model, under a name that nothing in the model begins with (`mtp.fc.weight`).
        """
        names: dict[int | None, list[str]] = {index: [] for index in (None, *range(self.num_layers))}
        self._idle: set[str] = set()
        known = self.model.state_dict()
        tops = {name.partition(".")[0] for name in known}
        indices = {path: index for index, path in enumerate(self.layer_paths)}
        for name, meant in names_in_model(self.model, self.checkpoint.tensors).items():
            prefix = next((one for one in self._prefixes if meant.startswith(one)), None)
            place = None if prefix is None else prefix + meant.removeprefix(prefix).partition(".")[0]
            surplus = place is not None and place not in indices
            spare = meant.partition(".")[0] not in tops
            unloaded = meant not in known and (spare or self._is_ignored(name, meant))
            if surplus or unloaded or self.arch.is_extra(name, self.raw_config):
                self.extra_names.append(name)
                continue
            names[None if place is None else indices[place]].append(name)
            if any(meant.startswith(f"{path}.") for path in self.flow.idle):
                self._idle.add(name)
        return names

    def _untie(self) -> None:
        """Part weights that config.json says are tied, but of which the checkpoint stores several that differ.

        `from_pretrained` does the same, comparing them in the compute dtype.
        """
        tied = self.model.all_tied_weights_keys
        for target, source in list(tied.items()):
            one, other = self._stored_name(target), self._stored_name(source)
            if one is None or other is None or self._same(one, other):
                continue
            tied.pop(target)
            owner, _, leaf = target.rpartition(".")
            apart = torch.empty_like(self.model.get_parameter(target), device="meta")
            setattr(self.model.get_submodule(owner), leaf, nn.Parameter(apart, requires_grad=False))

    def ties(self, path: str, other: str) -> bool:
        """Whether the parameters `path` and `other` are one, though both may be stored."""
        tied = self.model.all_tied_weights_keys
        return tied.get(path) == other or tied.get(other) == path

    def _stored_name(self, path: str) -> str | None:
        """Name on disk of parameter `path` outside the layers; None where it is not stored."""
        empty = torch.empty(self.model.get_parameter(path).shape, device="meta")
        (name,) = self._disk_names(None, {path: empty})
        return name if name in self.checkpoint.tensors else None

    def _same(self, left: str, right: str) -> bool:
        """Whether two tensors on disk hold the same values in the compute dtype."""
        if self.checkpoint.tensors[left].shape != self.checkpoint.tensors[right].shape:
            return False
        slices = self.checkpoint.slices([left, right])
        pairs = zip(*(slices[name][...].split(_ROWS) for name in (left, right)), strict=True)
        return all(torch.equal(one.to(self.dtype), other.to(self.dtype)) for one, other in pairs)

    def _is_ignored(self, name: str, meant: str) -> bool:
        """Whether the model's own class says that it does without this tensor, which it does not have (`mtp.*`)."""
        patterns = self.model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, one) for pattern in patterns for one in (name, meant))

    def _depth(self, path: str) -> int:
        return len(self.model.get_submodule(path))

    def layer(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.layer_paths[index])

    def check_names(self) -> None:
        """Map every tensor's name and shape onto the model, without reading any weight.

        Raises:
            CheckpointError: tensors the model does not know, lacks, or expects in another shape.
        """
        names = [name for name in self.checkpoint.tensors if name not in self.extra_names]
        info = self._convert(self._shapes(names), device="meta")
        self._refuse_missing(self._without_tied(info.missing_keys))

    def load_rest(self) -> None:
        """Fill everything outside the decoder layers: embeddings, final norm, head, rotary tables."""
        with self._load_lock:
            names = [name for name in self.names[None] if name not in self._idle]
            self._convert(self.checkpoint.slices(names), device=str(self.device), part=None)
        outside = (*self._prefixes, *(f"{path}." for path in self.flow.idle))
        tensors = self.model.state_dict().items()
        missing = {name for name, tensor in tensors if tensor.is_meta and not name.startswith(outside)}
        self._refuse_missing(self._without_tied(missing))
        loaded = {name: tensor for name, tensor in tensors if not tensor.is_meta and not name.startswith(outside)}
        refuse_integers(self.checkpoint, self._floats, loaded)
        refuse_weights(self.checkpoint, names, loaded.values())
        for name, module in self.model.named_modules():
            if not f"{name}.".startswith(outside):
                self._build_buffers(module)
                self._cast_own(module, name)
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)

    def _without_tied(self, missing: Iterable[str]) -> list[str]:
        """Names among `missing` that are not tied to one that is there."""
        absent = set(missing)
        groups: dict[str, set[str]] = {}
        for target, source in self.model.all_tied_weights_keys.items():
            groups.setdefault(source, {source}).add(target)
        excused = {name for group in groups.values() if not group <= absent for name in group}
        return sorted(absent - excused)

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """One decoder layer's tensors as transformers fuses them, in their dtype on disk, by name inside the layer.

        Safe to call from a prefetching thread while another layer computes.
        """
        with self._load_lock:
            self._convert(self.checkpoint.slices(self.names[index]), device=str(self.device), part=index)
        layer = self.layer(index)
        tensors = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
        layer.to("meta")
        prefix = f"{self.layer_paths[index]}."
        self._refuse_missing([prefix + name for name, tensor in tensors.items() if tensor.is_meta])
        if index not in self._judged:
            refuse_integers(self.checkpoint, self._floats, {prefix + name: tensor for name, tensor in tensors.items()})
            refuse_weights(self.checkpoint, self.names[index], tensors.values())
            self._judged.add(index)
        return tensors

    def fill_layer(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Give decoder layer `index` its tensors, in the compute dtype, and return it ready to run."""
        layer = self.layer(index)
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            _set_tensor(layer.get_submodule(owner) if owner else layer, leaf, tensor.to(self.device))
        for name, module in layer.named_modules():
            self._build_buffers(module)
            self._cast_own(module, f"{self.layer_paths[index]}.{name}".rstrip("."))
        return layer

    def set_router(self, index: int, weights: LayerWeights) -> nn.Module:
        """Give a filled MoE layer the router of `weights` alone, and return its MoE block; the experts stay."""
        block = self.layer(index).get_submodule(self.moe_layers[index].block)
        places = {f"{self.arch.router}.weight": weights.router_ED}
        if self.arch.router_bias and weights.router_bias_E is not None:
            places[self.arch.router_bias] = weights.router_bias_E
        if self.arch.correction_bias and weights.correction_bias_E is not None:
            places[self.arch.correction_bias] = weights.correction_bias_E
        if self.arch.expert_scale and weights.scale_E is not None:
            places[self.arch.expert_scale] = weights.scale_E
        for path, tensor in places.items():
            owner, _, leaf = path.rpartition(".")
            module = block.get_submodule(owner) if owner else block
            old = getattr(module, leaf)
            # A correction bias may be stored as [1, E].
            shaped = tensor[None] if old.dim() > tensor.dim() else tensor
            _set_tensor(module, leaf, shaped.to(self.device, old.dtype))
        return block

    def free_layer(self, index: int) -> None:
        self.layer(index).to("meta")

    def weights(self, index: int, native: Mapping[str, Tensor]) -> LayerWeights:
        """Canonical weights of a MoE layer from its tensors in disk dtype (`read_layer`)."""
        moe = self.moe_layers[index]
        return extract(self.arch, _inside(native, moe), moe.layout)

    def with_weights(
        self, index: int, native: Mapping[str, Tensor], weights: LayerWeights, *, only_changed: bool = False
    ) -> dict[str, Tensor]:
        """The layer's fused tensors (`read_layer`) with the experts and router replaced by `weights`."""
        moe = self.moe_layers[index]
        new = insert(self.arch, weights, _inside(native, moe), moe.layout)
        changed = {moe.inside(name): tensor for name, tensor in new.items()}
        return changed if only_changed else {**native, **changed}

    def disk_tensors(self, index: int, native: Mapping[str, Tensor], weights: LayerWeights) -> dict[str, Tensor]:
        """One layer's tensors under their original names on disk, with the experts and router replaced by `weights`.

        Tensors that do not belong to the MoE's experts or router come from the checkpoint byte for byte. The others
        get the dtype they have there: fusing an fp32 expert with bf16 ones makes all of them fp32.
        """
        changed, untouched = self.changed_tensors(index, native, weights)
        return {**self.checkpoint.read(untouched), **changed}

    def changed_tensors(
        self, index: int, native: Mapping[str, Tensor], weights: LayerWeights, *, without: Sequence[str] = ()
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Those of `disk_tensors` that `weights` has, and the names of all others.

        Args:
            without: names inside the layer of fused tensors that are not wanted.
        """
        new = self.with_weights(index, native, weights, only_changed=True)
        prefix = f"{self.layer_paths[index]}."
        shapes = {prefix + name: torch.empty(native[name].shape, device="meta") for name in new}
        replaced = self._disk_names(index, shapes)
        wanted = {prefix + name: tensor for name, tensor in new.items() if name not in without}
        renamed = self._disk_names(index, wanted)
        unknown = set(renamed) - set(self.names[index])
        if unknown:
            raise CheckpointError(f"layer {index} would get names its checkpoint does not have: {name_some(unknown)}")
        as_stored = {name: tensor.to(self._stored_dtype(name)) for name, tensor in renamed.items()}
        return as_stored, [name for name in self.names[index] if name not in replaced]

    def expert_tensors(self, index: int) -> list[ExpertTensor]:
        """Where the expert projections of layer `index` are on disk.

        Found by sending tiny tensors of numbered elements through transformers' own renaming.
        """
        moe, count = self.moe_layers[index], self.arch.num_experts(self.raw_config)
        assert count is not None
        numbered = NumberedExperts(count, gated=moe.layout.gated)
        prefix = f"{self.layer_paths[index]}.{moe.inside('')}"
        fused = insert(self.arch, numbered.weights(), {}, moe.layout)
        router = f"{self.arch.router}.weight"
        renamed = self._disk_names(index, {prefix + name: one for name, one in fused.items() if name != router})
        return [numbered.identify(name, tensor) for name, tensor in renamed.items()]

    def disk_name(self, index: int, path: str) -> str | None:
        """Name on disk of parameter `path` of layer `index`; None where several parameters share a tensor on disk."""
        tensor = torch.empty(self.layer(index).get_parameter(path).shape, device="meta")
        found = self._disk_names(index, {f"{self.layer_paths[index]}.{path}": tensor})
        (name, renamed), *more = found.items()
        return None if more or renamed.shape != tensor.shape or name not in self.names[index] else name

    def stored_tensors(self, part: int | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of layer `part` (None: outside the layers), by their names in the model, as they are on disk.

        They get their original names and dtypes; the checkpoint's own that are not among them are left out, and so are
        tied ones that it does not hold.
        """
        renamed = self._disk_names(part, tensors)
        known = self.checkpoint.tensors
        return {name: tensor.to(self._stored_dtype(name)) for name, tensor in renamed.items() if name in known}

    def names_beside(self, index: int, native: Mapping[str, Tensor], block: str) -> list[str]:
        """Names on disk of one layer's tensors that do not lie inside the module `block`."""
        prefix = f"{self.layer_paths[index]}."
        beside = {prefix + name: tensor for name, tensor in native.items() if not name.startswith(f"{block}.")}
        return sorted(self._disk_names(index, beside))

    def _stored_dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self.checkpoint.tensors[name].dtype]

    def _disk_names(self, index: int | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self._load_lock:
            if index not in self._conversions:
                self._convert(self._shapes(self.names[index]), device="meta", part=index)
            return revert(self.model, self._conversions[index], tensors)

    def _shapes(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors without values, to find out how transformers renames and fuses."""
        return {name: torch.empty(self.checkpoint.tensors[name].shape, device="meta") for name in names}

    def _refuse_missing(self, names: Sequence[str]) -> None:
        if not names:
            return
        hint = wrapper_hint(self.extra_names, names[:1]) or headless_hint(names)
        hint = hint or "the checkpoint is incomplete or its config.json belongs to another model"
        raise CheckpointError(f"{self.checkpoint.path}: no tensor for {name_some(names)}", hint=hint)

    def _convert(self, tensors: Mapping[str, Any], *, device: str, part: int | None = None) -> Any:
        info, self._conversions[part] = convert(self.model, tensors, device)
        if device == "meta":
            # Each got a tensor of its own.
            self.model.tie_weights(recompute_mapping=False)
        problems = {
            "unknown tensors": info.unexpected_keys,
            "tensors of another shape": {
                f"{name} {list(found)}, not {list(meant)}" for name, found, meant in info.mismatched_keys
            },
            "tensors that cannot be converted": set(info.conversion_errors),
        }
        for what, names in problems.items():
            if names:
                hint = wrapper_hint(names, ())
                hint = hint or "does config.json belong to these weights? packed ones need their `quantization_config`"
                raise CheckpointError(
                    f"{self.checkpoint.path}: {what} for model_type '{self.arch.model_type}': {name_some(names)}",
                    hint=hint,
                )
        return info

    def _build_buffers(self, module: nn.Module) -> None:
        """Compute a module's non-persistent buffers (rotary tables), which no checkpoint holds, on the real device."""
        names = module._non_persistent_buffers_set
        if not names or not any(module._buffers[name] is not None for name in names):
            return
        for name in names:
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=self.device)
        with construction(self.checkpoint.path):
            self.model._init_weights(module)

    def _cast_own(self, module: nn.Module, path: str) -> None:
        """Bring a module's own tensors to the compute dtype, except those the family always keeps in fp32."""
        kept = [re.compile(key.replace("*", r".*")) for key in self.model._get_dtype_plan(self.dtype)]
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if tensor.is_meta or not tensor.is_floating_point() or name in module._non_persistent_buffers_set:
                continue
            dtype = torch.float32 if any(pattern.search(f"{path}.{name}") for pattern in kept) else self.dtype
            if tensor.dtype != dtype:
                _set_tensor(module, name, tensor.to(dtype))


_FLOWS: dict[str, LayerFlow] = {}


def _flow(model: Any, decoder_path: str, config: Mapping[str, Any]) -> LayerFlow:
    """What the family's layers hand on, tried once per config."""
    key = f"{type(model).__module__}.{type(model).__name__} {json.dumps(config, sort_keys=True, default=str)}"
    if key not in _FLOWS:
        _FLOWS[key] = try_layers(model, decoder_path)
    return _FLOWS[key]


def _set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name not in module._buffers:
        tensor = nn.Parameter(tensor, requires_grad=False)
    # transformers' own mark: `_init_weights`, which builds the rotary tables, leaves such a tensor alone.
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    (module._buffers if name in module._buffers else module._parameters)[name] = tensor  # type: ignore[assignment]


def _inside(tensors: Mapping[str, Tensor], moe: MoeLayer) -> dict[str, Tensor]:
    prefix = moe.inside("")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
