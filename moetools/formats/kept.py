"""A packed checkpoint stays packed when its experts are chosen or put in another order: config.json, and what loads it.

Nothing is decoded here. `quantization_config` stays the input's but for experts that it names one by one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moetools.architectures.base import Architecture
from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.folder import read_json_object
from moetools.errors import UserError
from moetools.formats.base import Format
from moetools.formats.preflight import check as preflight
from moetools.formats.reader import PackedCheckpoint
from moetools.grids.base import Grid

_NUMBERED = re.compile(r"\bexperts\\?\.\d")
_MODULE = re.compile(
    r"(?P<front>(?!.*\bmtp\.)[\w.]*\blayers\.(?P<layer>\d+)\.(?:\w+\.)*experts\.)(?P<expert>\d+)(?P<rest>\.[\w.]*)?"
)
"""One module, or what is inside it. `mtp.layers.0` is no decoder layer 0."""


def keeping_problem(view: PackedCheckpoint, experts: int) -> str:
    """Why experts of a checkpoint cannot be taken as they lie on disk; empty where they can.

    Args:
        experts: how many a layer has.
    """
    if view.format_name == "moetools":
        return "moetools' own format lists every tensor with its shape, and is not cut"
    stated = [view.quantization, *(read_json_object(view.path / name) for name in view.quantization_files())]
    for entry in (entry for one in stated for entry in _entries(one)):
        if _NUMBERED.search(entry) and _MODULE.fullmatch(entry) is None:
            return f"`quantization_config` speaks of single experts ('{entry[:80]}') in a way that is not renumbered"
    for packed in view.packed.values():
        leading = {view.disk.tensors[disk].shape[:1] for disk in packed.parts.values()}
        if len(packed.shape) == 3 and leading != {(experts,)}:
            return f"'{packed.name}' is not stored expert by expert"
    return ""


def kept_config(quantization: Mapping[str, Any], kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """`quantization_config` for the experts that are kept.

    Args:
        kept: old number of every new expert, by the layer's number on disk; other layers are left alone.
    """
    return {key: _kept_value(value, kept) for key, value in quantization.items()}


def carry_quantization_files(view: PackedCheckpoint, contents: Path, kept: Mapping[int, Sequence[int]]) -> None:
    """Put the files beside config.json that say how weights are packed into an output, for the experts it keeps."""
    for name in view.quantization_files():
        target = contents / name
        target.parent.mkdir(parents=True, exist_ok=True)
        stated = read_json_object(view.path / name)
        changed = kept_config(stated, kept)
        text = json.dumps(changed, indent=2) + "\n"
        write_durably(target, (view.path / name).read_bytes() if changed == stated else text.encode())


def _kept_value(value: Any, kept: Mapping[int, Sequence[int]]) -> Any:
    """Names in lists and keys of objects get their new numbers; those of dropped experts go."""
    if isinstance(value, list):
        renamed = [_renamed(one, kept) if isinstance(one, str) else _kept_value(one, kept) for one in value]
        return [one for one in renamed if one is not None]
    if isinstance(value, dict):
        named = [(_renamed(key, kept), one) for key, one in value.items()]
        return {key: _kept_value(one, kept) for key, one in named if key is not None}
    return value


def _renamed(entry: str, kept: Mapping[int, Sequence[int]]) -> str | None:
    found = _MODULE.fullmatch(entry)
    if found is None or int(found["layer"]) not in kept:
        return entry
    experts, old = kept[int(found["layer"])], int(found["expert"])
    return f"{found['front']}{list(experts).index(old)}{found['rest'] or ''}" if old in experts else None


def _entries(value: Any) -> list[str]:
    """Every string of a list, and every key of an object, however deep."""
    if isinstance(value, list):
        return [entry for one in value for entry in ([one] if isinstance(one, str) else _entries(one))]
    if isinstance(value, Mapping):
        return [entry for key, one in value.items() for entry in (key, *_entries(one))]
    return []


def stock_problem(view: PackedCheckpoint, arch: Architecture) -> str:
    """Why stock transformers does not load a packed checkpoint on a CPU as it was meant; empty where it does."""
    if not view.layout.stock:
        return f"stock transformers does not load {view.format_name} without more packages"
    grids: dict[str, Grid] = {name: one.grid for name, one in view.packed.items() if one.grid is not None}
    if not isinstance(view.layout, Format) or len(grids) < len(view.packed):
        return next(filter(None, map(view.layout.stock_problem, view.packed.values())), "")
    try:
        preflight(view.format_name, grids, view, arch, "transformers")
    except UserError as error:
        return error.message
    return ""
