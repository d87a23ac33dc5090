"""Write a trained model under its checkpoint's own names and dtypes, layer by layer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.checkpoint.writer import CheckpointWriter
from moetools.formats.reader import PackedCheckpoint
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.verification import Intended, probe_batch, tensor_digests
from moetools.text.tokens import TokenData


def write_trained(
    writer: CheckpointWriter, model: StreamedModel, state: Mapping[str, Tensor], data: TokenData
) -> Intended:
    """All units of the trained model, and what was meant by them.

    Args:
        model: the checkpoint that was trained.
        state: its trained tensors by name in the model, in any dtype; what is missing stays as it was.
    """
    stock, skeleton = model.stock, model.skeleton
    prefix = f"{stock.decoder_path}.layers.".lstrip(".")
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    source = model.checkpoint
    on_disk = {**_as_stored(source, [*stock.names[None], *stock.extra_names]), **stock.stored_tensors(None, rest)}
    if "rest" not in writer.finished:
        writer.write_unit("rest", on_disk)
    writer.carry_sidecars()
    writer.write_json("config.json", source.disk.config if isinstance(source, PackedCheckpoint) else model.config)
    _fill_rest(model, rest)
    batch = model.on_device(probe_batch(data, model.vocab_size))
    digests: dict[int, dict[str, str]] = {}
    with torch.inference_mode():
        hidden = skeleton.enter(batch)[0]
        for layer in model.layers(keep_native=True, fill=False):
            assert layer.native is not None
            inside = f"{prefix}{layer.index}."
            new = {
                name: state[inside + name].to(tensor.dtype)
                for name, tensor in layer.native.items()
                if inside + name in state
            }
            tensors = {**layer.native, **{name: tensor.to(layer.native[name].device) for name, tensor in new.items()}}
            digests[layer.index] = tensor_digests(tensors)
            unit = f"layer-{layer.index:05d}"
            if unit not in writer.finished:
                stored = stock.stored_tensors(layer.index, {inside + name: tensor for name, tensor in new.items()})
                writer.write_unit(unit, {**_as_stored(source, stock.names[layer.index]), **stored})
            hidden = model.run_tensors(layer.index, tensors, batch, hidden)
        logits = skeleton.logits(batch, hidden)
    return Intended(digests=digests, batch=batch, logits=logits, rest=tensor_digests(on_disk))


def _as_stored(source: Checkpoint, names: Sequence[str]) -> dict[str, Tensor]:
    """Some tensors as they lie on disk; packed ones are not decoded, and have other names there."""
    if not isinstance(source, PackedCheckpoint):
        return source.read(names)
    return source.disk.read(disk for name in names for disk in _parts(source, name))


def _parts(source: PackedCheckpoint, name: str) -> Sequence[str]:
    return list(source.packed[name].parts.values()) if name in source.packed else [name]


def stored_dtypes(model: StreamedModel) -> dict[str, torch.dtype]:
    """Dtype on disk of every tensor by its name in the model."""
    stock = model.stock
    rest = {name: TORCH_DTYPES[model.checkpoint.tensors[name].dtype] for name in stock.names[None]}
    prefix = f"{stock.decoder_path}.layers.".lstrip(".")
    layers = range(stock.num_layers)
    inside = {f"{prefix}{index}.{name}": one.dtype for index in layers for name, one in stock.read_layer(index).items()}
    return rest | inside


def _fill_rest(model: StreamedModel, rest: Mapping[str, Tensor]) -> None:
    """Give the model in memory the trained tensors outside its layers, rounded as on disk."""
    inside = dict(model.stock.model.named_parameters())
    stored = {name: info.dtype for name, info in model.checkpoint.tensors.items()}
    for name, tensor in rest.items():
        if name in inside and not inside[name].is_meta:
            rounded = tensor.to(TORCH_DTYPES[stored[name]] if name in stored else tensor.dtype)
            inside[name].data.copy_(rounded)
