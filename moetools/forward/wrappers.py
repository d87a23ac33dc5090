"""Names of tensors that were saved from inside a wrapper, and what to do about them."""

import re
from collections.abc import Iterable, Sequence

_MERGE = "merge the adapter first, `model.merge_and_unload().save_pretrained(...)`"
_RENAME = "save the model itself, `model.{}.save_pretrained(...)`, or rename the tensors without it"
# Of longer ones first: what wraps the model may stand in any place of a name, and in several.
_WRAPPERS = {
    "base_model.model.": ("peft", _MERGE),
    "base_layer.": ("peft", _MERGE),
    "lora_": ("peft", _MERGE),
    "_orig_mod.": ("torch.compile", _RENAME.format("_orig_mod")),
    "_fsdp_wrapped_module.": ("FSDP", "rename the tensors without it, or save with accelerate's `save_model`"),
    "_checkpoint_wrapped_module.": ("activation checkpointing", "rename the tensors without it"),
    "_forward_module.": ("Lightning", "rename the tensors without it"),
    "module.": ("DataParallel or DeepSpeed", _RENAME.format("module")),
}


def headless_hint(missing: Sequence[str]) -> str:
    """What to do where nothing but the head is missing; nothing otherwise."""
    if list(missing) != ["lm_head.weight"]:
        return ""
    return (
        "if the head shares the embeddings, set `tie_word_embeddings` to true in config.json; else it was left out "
        "when the model was saved"
    )


def wrapper_hint(names: Iterable[str], missing: Iterable[str]) -> str:
    """What wrapped the model whose tensors have these names, and how to get rid of it; nothing if they are plain.

    Args:
        names: of tensors on disk that the model does not have.
        missing: of tensors that it has and that are not on disk; if one of them ends a name, what stands before it
            is an unknown wrapper.
    """
    names = sorted(names)
    for part, (who, remedy) in _WRAPPERS.items():
        wrapped = next((name for name in names if re.search(rf"(?:^|\.){re.escape(part)}", name)), None)
        if wrapped is not None:
            return f"'{part}' in their names is the mark of {who}: {remedy}"
    ends = next(((one, name) for one in missing for name in names if name.endswith(f".{one}")), None)
    if ends is None:
        return ""
    return f"their names begin with '{ends[1].removesuffix(ends[0])}': rename the tensors without it"
