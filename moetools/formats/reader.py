"""Opens any checkpoint, plain or packed, as one with dense tensors that are decoded when they are read."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetools.architectures.config_check import check_config
from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.headers import DTYPE_BITS, TensorInfo
from moetools.checkpoint.reader import Checkpoint, Lazy, natural_key, open_checkpoint
from moetools.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from moetools.formats.base import Layout, Packed
    from moetools.grids.base import Quantized


_MODELOPT_FILE = "hf_quant_config.json"
QUANTIZATION_FILES = (_MODELOPT_FILE, "quantize_config.json", "quant_config.json")
"""Of ModelOpt, AutoGPTQ and AutoAWQ, beside config.json or instead of its `quantization_config`."""

_LOADING_THREADS = 4
"""Of transformers' loader."""


@dataclass(frozen=True, eq=False)
class PackedCheckpoint(Checkpoint):
    """A packed checkpoint seen as the dense one it stands for.

    Names, shapes and dtypes in `tensors` are the dense ones, `nbytes` what the dense tensor takes in memory, and
    `config` says nothing of quantization, so everything that runs a plain checkpoint runs this one. Headers,
    fingerprint, sidecars and `total_bytes` are those of the disk.

    Attributes:
        disk: the same folder as it is.
        layout: the format of its packed tensors.
        packed: every packed tensor by its dense name.
    """

    disk: Checkpoint
    layout: Layout
    packed: Mapping[str, Packed]

    @property
    def quantization(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        return self.disk.config["quantization_config"]

    @property
    def format_name(self) -> str:
        return self.layout.name

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return self.disk.total_bytes

    def disk_names(self, name: str) -> list[str]:
        """Names on disk of what a tensor is made of: its parts, or itself."""
        packed = self.packed.get(name)
        return list(packed.parts.values()) if packed else [name]

    def stored_bytes(self, name: str) -> int:
        """Bytes that a tensor takes on disk, scales and zeros included."""
        return sum(self.disk.tensors[part].nbytes for part in self.disk_names(name))

    def read_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The parts of the named tensors, by name on disk."""
        return self.disk.read(disk for name in names for disk in self.disk_names(name))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, decoded."""
        infos = [self._info(name) for name in dict.fromkeys(names)]
        found = self.disk.read(info.name for info in infos if info.name not in self.packed)
        found |= self._decode([info.name for info in infos if info.name in self.packed])
        return {info.name: found[info.name] for info in infos}

    def slices(self, names: Iterable[str]) -> dict[str, Lazy]:
        """Lazy values as transformers' loader takes them; a packed one is decoded at each access.

        Those of a kind that decodes much faster together are decoded at the first access to one of them, and each is
        kept until it is asked for.
        """
        infos = [self._info(name) for name in names]
        plain = self.disk.slices(info.name for info in infos if info.name not in self.packed)
        packed = [self.packed[info.name] for info in infos if info.name in self.packed]
        together = _Together(self, [one.name for one in packed if self.layout.better_together(one)])
        return {info.name: plain[info.name] if info.name in plain else Lazy(info, together.take) for info in infos}

    def decode_bytes(self, names: Iterable[str]) -> int:
        """Of the packed tensors that are decoded at the same time: parts, and what decoding works on.

        transformers' loader asks for some tensors at once; those that decode faster together are all there.
        """
        packed = [self.packed[name] for name in names if name in self.packed]
        together = [self._decode_bytes(one) for one in packed if self.layout.better_together(one)]
        alone = [self._decode_bytes(one) for one in packed if not self.layout.better_together(one)]
        return sum(together) + sum(sorted(alone)[-_LOADING_THREADS:])

    def _decode_bytes(self, packed: Packed) -> int:
        rows, columns = packed.shape[-2:]
        return self.stored_bytes(packed.name) + self.layout.working_bytes * rows * columns

    def sidecar_files(self) -> list[Path]:
        """Those of the disk, but what says how weights are packed: see `quantization_files`."""
        return [name for name in super().sidecar_files() if name.name not in QUANTIZATION_FILES]

    def quantization_files(self) -> list[Path]:
        """Relative paths of files that say how weights are packed, which are wrong beside weights that are not."""
        return [name for name in super().sidecar_files() if name.name in QUANTIZATION_FILES]

    def quantized(self, name: str) -> Quantized:
        """Codes and scales of a packed tensor.

        Raises:
            CheckpointError: not packed, of a layout that is only read to dense tensors, or corrupt.
        """
        from moetools.formats.base import Format

        if name not in self.packed or not isinstance(self.layout, Format):
            raise CheckpointError(f"{self.path}: '{name}' has no codes and scales here")
        packed = self.packed[name]
        return self.layout.unpack(packed, self.disk.read(packed.parts.values()))

    def _decode(self, names: Sequence[str]) -> dict[str, Tensor]:
        packed = [self.packed[name] for name in names]
        found: dict[str, Tensor] = {}
        # Those that gain nothing from company are decoded one at a time: their parts never lie in memory together.
        alone = [one for one in packed if not self.layout.better_together(one)]
        for group in [[one] for one in alone] + [[one for one in packed if self.layout.better_together(one)]]:
            parts = self.disk.read(disk for one in group for disk in one.parts.values())
            decoded = self.layout.read_many(group, parts)
            found |= {one.name: tensor for one, tensor in zip(group, decoded, strict=True)}
        return found


class _Together:
    """Decodes some packed tensors at the first access to one of them, others at each access."""

    def __init__(self, checkpoint: PackedCheckpoint, names: Sequence[str]) -> None:
        self._checkpoint, self._names = checkpoint, frozenset(names)
        self._waiting: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def take(self, name: str) -> Tensor:
        if name not in self._names:
            return self._checkpoint._decode([name])[name]
        with self._lock:
            if name not in self._waiting:
                self._waiting = self._checkpoint._decode(sorted(self._names, key=natural_key))
            return self._waiting.pop(name)


def open_model(path: Path | str) -> Checkpoint:
    """Opens a plain checkpoint as `open_checkpoint` does, and a packed one as a `PackedCheckpoint`.

    Raises:
        CheckpointError: see `open_checkpoint`; packed in a way that is not read here; parts that do not fit together.
    """
    checkpoint = with_known_config(open_checkpoint(path))
    check_config(checkpoint.config, checkpoint.path / "config.json")
    return packed_view(checkpoint) if checkpoint.config.get("quantization_config") else checkpoint


def with_known_config(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with config.json as stock loaders know it.

    A `quantization_config` inside `text_config` (Kimi-K2.5) moves to the top, and one that ModelOpt wrote into a
    file of its own is added. Kimi-K2 is DeepSeek-V3 under a name of its own, which stock transformers does not know.
    """
    config = checkpoint.config
    text = config.get("text_config")
    if isinstance(text, dict) and text.get("quantization_config") and not config.get("quantization_config"):
        inner = {key: value for key, value in text.items() if key != "quantization_config"}
        config = {**config, "text_config": inner, "quantization_config": text["quantization_config"]}
    packed = any(info.dtype in ("U8", "F8_E4M3") for info in checkpoint.tensors.values())
    if packed and not config.get("quantization_config") and (checkpoint.path / _MODELOPT_FILE).is_file():
        config = {**config, "quantization_config": _modelopt_config(checkpoint.path / _MODELOPT_FILE)}
    if config.get("model_type") == "kimi_k2":
        config = {key: value for key, value in config.items() if key != "auto_map"}
        config |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    return checkpoint if config is checkpoint.config else replace(checkpoint, config=config)


def _modelopt_config(file: Path) -> dict[str, Any]:
    """`quantization_config` as ModelOpt puts it into config.json today, from its own file."""
    stated = read_json_object(file).get("quantization")
    if not isinstance(stated, dict) or not isinstance(stated.get("quant_algo"), str):
        raise CheckpointError(f"{file}: names no `quant_algo`", hint="download this file again")
    named = {key: value for key, value in stated.items() if key != "exclude_modules"}
    return {"quant_method": "modelopt", **named, "ignore": stated.get("exclude_modules") or []}


def packed_view(checkpoint: Checkpoint) -> PackedCheckpoint:
    """The dense view of a checkpoint whose config.json has a `quantization_config`."""
    from moetools.formats.base import find_layout

    layout = find_layout(checkpoint.config["quantization_config"], checkpoint.tensors)
    packed = {one.name: one for one in layout.find(checkpoint)}
    parts = {disk for one in packed.values() for disk in one.parts.values()}
    infos = {name: info for name, info in checkpoint.tensors.items() if name not in parts}
    _refuse_unscaled(checkpoint, infos.values())
    infos |= {name: _dense_info(checkpoint, one) for name, one in packed.items()}
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    tensors = {name: infos[name] for name in sorted(infos, key=natural_key)}
    whole = (checkpoint.path, config, tensors, checkpoint.headers, checkpoint, layout, packed)
    return PackedCheckpoint(*whole, partial=checkpoint.partial)


def _refuse_unscaled(checkpoint: Checkpoint, infos: Iterable[TensorInfo]) -> None:
    """8-bit floats that no packed tensor claims are codes whose scales are missing."""
    for info in infos:
        if info.dtype.startswith("F8_"):
            raise CheckpointError(
                f"{checkpoint.path}: '{info.name}' is stored as {info.dtype} and its scales are missing",
                hint="`quantization_config` in config.json says how weights are packed: does it belong to these files?",
            )


def precision_note(checkpoint: Checkpoint, *, kept: bool = False) -> str:
    """What becomes of packed weights: "written as bfloat16; the input was ...", or `kept`; nothing for plain ones."""
    if not isinstance(checkpoint, PackedCheckpoint):
        return ""
    if kept:
        return f"packed as in the input, byte for byte: {describe_quantization(checkpoint)}"
    from moetools.formats.parts import torch_name

    dtypes = sorted({torch_name(packed.dtype) for packed in checkpoint.packed.values()})
    return f"written as {' and '.join(dtypes)}; the input was {describe_quantization(checkpoint)}"


def describe_quantization(view: PackedCheckpoint) -> str:
    """One line: the format, and how many tensors of which grid."""
    counts: dict[str, int] = {}
    for packed in view.packed.values():
        grid = grid_words(packed)
        counts[grid] = counts.get(grid, 0) + 1
    return f"{view.format_name} ({', '.join(f'{count} tensors {grid}' for grid, count in counts.items())})"


def expand(view: PackedCheckpoint) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Dense tensors unit by unit: one decoder layer each, the rest last; `view.config` is the config.json for them."""
    units: dict[str, list[str]] = {}
    for name in view.tensors:
        units.setdefault(_unit(name), []).append(name)
    for unit in sorted(units, key=lambda unit: (unit == "rest", natural_key(unit))):
        yield unit, view.read(units[unit])


def _unit(name: str) -> str:
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return f"layer-{int(layer[1]):05d}" if layer else "rest"


def _dense_info(checkpoint: Checkpoint, packed: Packed) -> TensorInfo:
    elements = 1
    for size in packed.shape:
        elements *= size
    main = checkpoint.tensors[next(iter(packed.parts.values()))]
    nbytes = elements * DTYPE_BITS[packed.dtype] // 8
    return TensorInfo(packed.name, packed.dtype, packed.shape, nbytes, main.file, main.offset)


def grid_words(packed: Packed) -> str:
    """What a packed tensor can hold: "integer4 per 128 columns"."""
    if packed.grid is None:
        return packed.words
    described = packed.grid.describe()
    kind, bits, group = described["kind"], described.get("bits"), described.get("group_size")
    name = "ternary" if described.get("ternary") else described.get("type") or f"{kind}{bits or ''}"
    return f"{name} per {group} columns" if group else f"{name} per row"
