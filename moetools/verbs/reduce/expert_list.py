"""An explicit list of experts to keep, as the user writes it, and the pruning method that follows it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetools.errors import UserError
from moetools.methods.base import ExpertTarget
from moetools.methods.prune.base import KeepListed

EXPLICIT = "explicit"
_HINT = "write 0,2,5 for every layer, or a JSON file with a list, or with an object of lists by layer"

Listed = str | list[int] | dict[int, list[int]]
"""What `experts` may be: text, see `parse_experts`, or numbers for every layer, or by layer."""


@dataclass(frozen=True, kw_only=True)
class ExpertList:
    """Experts to keep.

    Attributes:
        every: those of every MoE layer, or None if each layer has its own.
        layers: layer -> its experts; empty if `every` is given.
    """

    every: tuple[int, ...] | None
    layers: Mapping[int, tuple[int, ...]]

    @property
    def count(self) -> int:
        """Experts that are listed for a layer."""
        return len(next(iter(self.layers.values())) if self.every is None else self.every)

    def method(self) -> KeepListed:
        """The pruning method that keeps them."""
        return KeepListed(every=self.every, layers=self.layers)

    def check(self, moe_layers: Sequence[int], num_experts: int, keep: int, num_groups: int) -> None:
        """Refuse lists that a model cannot keep.

        Raises:
            UserError: naming the layer: it has no experts, or none are listed for it, or an expert is listed twice or
                does not exist, or another number than `keep` is listed, or router groups would keep different numbers.
        """
        unknown = sorted(set(self.layers) - set(moe_layers))
        if unknown:
            raise UserError(f"`experts` lists layer {unknown[0]}, which has no routed experts")
        missing = sorted(set(moe_layers) - set(self.layers))
        if missing and self.every is None:
            raise UserError(f"`experts` lists nothing for layer {missing[0]}", hint="list every MoE layer")
        for layer in moe_layers:
            self.method().plan({}, ExpertTarget(num_experts=num_experts, keep=keep, num_groups=num_groups, layer=layer))


def listed_experts(method: str, given: Listed | None) -> ExpertList | None:
    """The list given with `experts`; None where another method chooses.

    Raises:
        UserError: a list without the method "explicit", the method without a list, or a list that is none.
    """
    if given is None and method != EXPLICIT:
        return None
    if given is None:
        raise UserError("`method=explicit` needs a list of experts", hint="`experts=0,2,5` or `experts=FILE.json`")
    if method != EXPLICIT:
        raise UserError(
            f"`experts` lists the experts to keep, `method={method}` chooses them", hint="leave `method` out"
        )
    return parse_experts(given) if isinstance(given, str) else _as_list(given, "`experts`")


def parse_experts(text: str) -> ExpertList:
    """What `experts` says: numbers with commas, JSON, or the path of a JSON file.

    JSON is a list for every layer, or an object of lists by layer: {"0": [0, 2], "1": [1, 3]}.

    Raises:
        UserError: it is neither, or lists different numbers of experts in different layers.
    """
    if re.fullmatch(r"[\s\d,-]*", text):
        return ExpertList(every=_numbers(text.split(","), f"`experts={text}`"), layers={})
    try:
        content = json.loads(text if text.lstrip().startswith(("[", "{")) else Path(text).read_text())
    except OSError as error:
        raise UserError(f"`experts={text}`: {error.strerror or error}", hint=_HINT) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"`experts={text}` is not JSON: {error}", hint=_HINT) from None
    return _as_list(content, f"`experts={text}`")


def _as_list(content: Any, what: str) -> ExpertList:
    if isinstance(content, list):
        return ExpertList(every=_numbers(content, what), layers={})
    if not isinstance(content, dict) or not content:
        raise UserError(f"{what} holds neither a list nor an object of lists", hint=_HINT)
    layers = {}
    for key, listed in content.items():
        (layer,) = _numbers([key], what)
        layers[layer] = _numbers(listed, f"{what}, layer {key}")
    _refuse_unequal(layers)
    return ExpertList(every=None, layers=layers)


def _refuse_unequal(layers: Mapping[int, Sequence[int]]) -> None:
    first, *others = layers
    for layer in others:
        if len(layers[layer]) != len(layers[first]):
            raise UserError(
                f"`experts` lists {len(layers[first])} experts for layer {first} and {len(layers[layer])} for layer "
                f"{layer}; every layer must keep equally many",
                hint="only equal numbers load in stock transformers",
            )


def _numbers(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{what} is not a list of expert numbers", hint=_HINT)
    found = []
    for value in values:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not (isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value)):
            raise UserError(f"{what}: {value!r} is not the number of an expert", hint=_HINT)
        found.append(int(value))
    return tuple(found)
