"""The `quantization_config` of compressed-tensors: which modules have which scheme, written and looked up.

Module paths differ between the checkpoint and transformers (`block_sparse_moe` is `mlp` there), so patterns name as few
components from the end as tell the quantized modules from the others.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moetools.checkpoint.reader import Checkpoint
from moetools.errors import CheckpointError

METHOD = "compressed-tensors"
ALWAYS_IGNORED = ("lm_head", r"re:.*\.gate$", r"re:.*\.router$", r"re:.*shared_expert_gate$")
EXPERTS_TARGET = r"re:.*\.experts($|\..*)"
_EXPERT = re.compile(r"\.experts\.\d+\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_LONGEST_MODULE, _LONGEST_PATTERN, _REPEATED = 256, 1000, 5
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{\d*,)")
_REPEATS = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\d*\})")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")


def is_expert(name: str) -> bool:
    """Whether a tensor or module belongs to a routed expert."""
    return bool(_EXPERT.search(name))


def write_config(layout: str, schemes: Mapping[str, Mapping[str, Any]], source: Checkpoint) -> dict[str, Any]:
    """A `quantization_config` that gives every tensor in `schemes` its scheme and leaves all others alone.

    The experts' group comes first: stock transformers takes the experts' scheme from the first group whose targets
    mention experts.

    Args:
        layout: compressed-tensors' name of the format.
        schemes: `weights` and `input_activations` of every quantized tensor, by its name.
    """
    quantized = {module_name(name) for name in schemes}
    plain = plain_modules(quantized, source)
    ignore = [pattern for pattern in ALWAYS_IGNORED if not any(_hits(pattern, name) for name in quantized)]
    rest = [name for name in plain if not any(_hits(pattern, name) for pattern in ignore)]
    groups: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(json.dumps(scheme, sort_keys=True), []).append(module_name(name))
    ordered = sorted(groups.items(), key=lambda item: not any(map(is_expert, (f"{name}." for name in item[1]))))
    return {
        "quant_method": METHOD,
        "format": layout,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": [*ignore, *covering_patterns(rest, quantized)],
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if len(ordered) == 1 else _targets(names, quantized - set(names)),
                "format": layout,
                **json.loads(scheme),
            }
            for number, (scheme, names) in enumerate(ordered)
        },
    }


def plain_modules(quantized: Iterable[str], source: Checkpoint) -> list[str]:
    """Modules with a matrix that stays as it is, embeddings excepted."""
    packed = set(quantized)
    names = (module_name(name) for name, info in source.tensors.items() if name.endswith(".weight") and _matrix(info))
    return [name for name in names if name not in packed and not name.endswith(_EMBEDDINGS)]


def module_name(tensor: str) -> str:
    """`model.layers.0.self_attn.q_proj` for `model.layers.0.self_attn.q_proj.weight`."""
    return tensor.removesuffix(".weight")


def covering_patterns(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """Patterns (`re:...`) that together match every module in `wanted` and none in `others`.

    A pattern is the shortest run of components from the end that no other module shares, with any number for a number:
    `re:.*\\.q_proj$`. Where layers differ in what is quantized, their numbers are named.
    """
    found: list[str] = []
    other_forms = {_form(name) for name in others}
    by_form: dict[str, list[str]] = {}
    for name in wanted:
        by_form.setdefault(_form(name), []).append(name)
    for form, names in sorted(by_form.items()):
        suffix = _own_suffix(form, other_forms)
        if suffix:
            found.append(rf"re:(^|.*\.){suffix}$")
        else:
            found += _layer_patterns(names, others)
    return list(dict.fromkeys(found))


def find_weights(config: Mapping[str, Any], module: str) -> dict[str, Any]:
    """`weights` of the config group of a module, as stock loaders look it up.

    Experts: the first group with a pattern that mentions experts, else the first with a class name, else the first.
    Others: the first group with a target that matches.

    Raises:
        CheckpointError: no group targets the module, or one whose weights are not quantized.
    """
    weights = _find_group(config, module).get("weights")
    if not weights:
        raise CheckpointError(f"module '{module}' is packed, but its config group says nothing of weights")
    return weights


def _find_group(config: Mapping[str, Any], module: str) -> dict[str, Any]:
    groups = list((config.get("config_groups") or {}).values())
    if not groups:
        raise CheckpointError("quantization_config has no config_groups", hint="download config.json again")
    if is_expert(f"{module}."):
        return next(iter([*_naming_experts(groups), *_naming_classes(groups), groups[0]]))
    for group in groups:
        if any(not target.startswith("re:") or _hits(target, module) for target in group["targets"]):
            return group
    if len(groups) == 1:
        return groups[0]
    raise CheckpointError(f"module '{module}' is packed, but no config group of config.json targets it")


def _naming_experts(groups: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (group for group in groups if any(t.startswith("re:") and "experts" in t for t in group["targets"]))


def _naming_classes(groups: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (group for group in groups if any(not target.startswith("re:") for target in group["targets"]))


def _targets(names: Sequence[str], others: Iterable[str]) -> list[str]:
    experts = [name for name in names if is_expert(f"{name}.")]
    rest = [name for name in names if not is_expert(f"{name}.")]
    # Stock transformers takes any pattern with the word "experts" for that of the routed ones.
    patterns = [pattern.replace("shared_experts", r"shared_expert\w") for pattern in covering_patterns(rest, others)]
    return [EXPERTS_TARGET] * bool(experts) + patterns


def _matrix(info: Any) -> bool:
    return len(info.shape) == 2


def _hits(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return _compiled(pattern[3:]).match(module[:_LONGEST_MODULE]) is not None
    return pattern == module


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of config.json.

    Raises:
        CheckpointError: no regular expression, or one that could take for ever: a repeated group, or many repetitions.
    """
    if len(pattern) > _LONGEST_PATTERN or _REPEATED_GROUP.search(pattern) or len(_REPEATS.findall(pattern)) > _REPEATED:
        raise CheckpointError(f"quantization_config: the pattern '{pattern[:80]}' is too involved to be matched safely")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"quantization_config: '{pattern[:80]}' is no pattern: {error}") from error


def _form(module: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", module)


def _own_suffix(form: str, others: Iterable[str]) -> str | None:
    """The shortest suffix of `form` that none of `others` has, as a regular expression."""
    parts = form.split(".")
    rivals = [other.split(".") for other in others]
    for count in range(1, len(parts) + 1):
        suffix = parts[-count:]
        if suffix[0] != "#" and all(rival[-count:] != suffix for rival in rivals):
            return r"\.".join("[0-9]+" if part == "#" else re.escape(part) for part in suffix)
    return None


def _layer_patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    found = []
    rivals = list(others)
    for name in names:
        layer = _LAYER.search(name)
        here = [rival for rival in rivals if layer and f"layers.{layer[1]}." in rival]
        suffix = _own_suffix(_form(name), {_form(rival) for rival in here})
        if layer is None or suffix is None:
            found.append(f"re:{re.escape(name)}$")
        else:
            found.append(rf"re:.*layers\.{layer[1]}\.(.*\.)?{suffix}$")
    return found
