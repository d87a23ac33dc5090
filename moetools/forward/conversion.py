"""The bridge to transformers' loading: tensors on disk into a model's modules, and back to their names on disk.

This is the only module that touches transformers' loading internals (`get_model_conversion_mapping`,
`convert_and_load_state_dict_in_model`, `revert_weight_conversion`, `_get_dtype_plan`, `_weight_conversions`); they are
not a documented interface. Going through them means that a layer is loaded exactly as `from_pretrained` would load it,
for every family transformers knows.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from moetools.errors import CheckpointError

_KEEP_DTYPE: dict[str, Any] = {"": None}
"""A dtype plan whose one pattern matches every name and asks for no cast: tensors stay as they are on disk."""


def names_in_model(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Name on disk -> name in the model, as transformers' loader renames."""
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    known = model.state_dict()

    def meant(name: str) -> str:
        found, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if found in known or name not in known:
            return found
        return rename_source_key(name, [], [], model.base_model_prefix, known)[0]

    return {name: meant(name) for name in names}


def operations_on(model: Any, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Name on disk -> what transformers' loader does to the tensor beside renaming it: "MergeModulelist", ..."""
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    found = {}
    for name in names:
        _, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, model.state_dict())
        used = next((one for one in converters if pattern in one.source_patterns), None)
        found[name] = tuple(type(operation).__name__ for operation in (used.operations if used else ()))
    return found


def convert(model: Any, tensors: Mapping[str, Any], device: str) -> tuple[Any, list[Any]]:
    """Give a model (lazy) tensors in their dtype on disk.

    Returns:
        What transformers says of missing and unexpected ones, and the conversions it used, for `revert`.
    """
    info = _load(model, tensors, device_map={"": device}, dtype_plan=_KEEP_DTYPE)
    return info, list(model._weight_conversions)


def revert(model: Any, conversions: Sequence[Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name in the model, parted and renamed as they are on disk."""
    model._weight_conversions = conversions
    return revert_weight_conversion(model, dict(tensors))


def load_into(model: Any, tensors: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype) -> None:
    """Give a stock model the (lazy) tensors of a checkpoint, converted, cast and tied as `from_pretrained` does.

    Raises:
        CheckpointError: tensors that do not fit the model, or that it misses.
    """
    # The last pattern matches every name: parameters that are there already may have another dtype.
    dtypes = {**model._get_dtype_plan(dtype), "": dtype}
    info = _load(model, tensors, device_map={"": str(device)}, dtype=dtype, dtype_plan=dtypes)
    wrong = {name for name, *_ in info.mismatched_keys} | set(info.conversion_errors)
    wrong |= info.missing_keys - set(model.all_tied_weights_keys)
    if wrong:
        raise CheckpointError(f"tensors that the checkpoint lacks or that do not fit the model: {name_some(wrong)}")
    model.tie_weights(missing_keys=set(info.missing_keys), recompute_mapping=False)


def _load(model: Any, tensors: Mapping[str, Any], **plan: Any) -> Any:
    config = LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(model), **plan)
    with no_progress_bars():
        return convert_and_load_state_dict_in_model(model, dict(tensors), config)[0]


def name_some(names: Sequence[str] | set[str], most: int = 3) -> str:
    """The first few names, for messages."""
    shown = sorted(names)[:most]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence transformers' own progress bars; moetools draws one for the whole run."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()
