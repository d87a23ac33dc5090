"""What becomes of a checkpoint's multi-token-prediction (MTP) layers, decided before any weight is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moetools.architectures.mtp import MtpTensors
from moetools.errors import UserError
from moetools.plugins import unknown_name
from moetools.verbs.mtp_option import MTP_MODES

Mode = Literal["follow", "drop", "keep"]


@dataclass(frozen=True, kw_only=True)
class MtpFate:
    """What becomes of the MTP layers.

    Attributes:
        mode: what is done.
        tensors: what there is; None without MTP layers.
        warning: why they are dropped though nobody asked for it; empty otherwise.
    """

    mode: Mode
    tensors: MtpTensors | None
    warning: str = ""

    @property
    def dropped(self) -> frozenset[str]:
        """Tensors that the output does not get."""
        return frozenset(self.tensors.names) if self.mode == "drop" and self.tensors is not None else frozenset()

    def facts(self) -> dict[str, Any] | None:
        """For the report, JSON-able; None where there is nothing to tell."""
        if self.tensors is None:
            return None
        return {"mode": self.mode, "tensors": len(self.tensors.names), "experts": self.tensors.experts}


def mtp_words(facts: Mapping[str, Any] | None) -> str:
    """What became of the MTP layers, in a line; empty where there are none."""
    if facts is None:
        return ""
    if facts["mode"] == "keep":
        return "multi-token-prediction layers as they were"
    if facts["mode"] == "drop":
        return f"multi-token-prediction layers left out ({facts['tensors']} tensors)"
    rates = [layer["acceptance"] for layer in facts.get("layers", ()) if layer["acceptance"] is not None]
    told = ", ".join(
        f"{one['before']:.1%} of greedy drafts accepted before and {one['after']:.1%} after" for one in rates
    )
    return "multi-token-prediction layers reduced as well" + (f": {told}" if told else "")


def decide_mtp(
    asked: str | None, tensors: MtpTensors | None, *, before: int, experts: int, obstacle: Callable[[MtpTensors], str]
) -> MtpFate:
    """What `mtp` comes to for this checkpoint.

    Layers without routed experts, or with as many as the output will have, need no change. Where no expert is removed,
    they are changed only if that is asked for.

    Args:
        asked: the option; None if it was not given.
        before, experts: what config.json says of the input and will say of the output.
        obstacle: tells why the layers cannot follow, nothing where they can; asked only if they are to.

    Raises:
        UserError: an unknown mode, layers that cannot follow, or an output that no loader takes.
    """
    if asked not in (None, *MTP_MODES):
        raise unknown_name("mtp", str(asked), list(MTP_MODES))
    if asked == "drop":
        return MtpFate(mode="drop", tensors=tensors)
    if tensors is None or tensors.experts in (0, experts) or (asked is None and experts == before):
        return MtpFate(mode="keep", tensors=tensors)
    if asked == "keep":
        raise UserError(
            f"`mtp=keep`: the multi-token-prediction layers have {tensors.experts} experts and config.json will count "
            "fewer: vLLM, SGLang and llama.cpp do not load that",
            hint="`mtp=follow` reduces them too, `mtp=drop` leaves them out",
        )
    problem = obstacle(tensors)
    if not problem:
        return MtpFate(mode="follow", tensors=tensors)
    if asked == "follow":
        raise UserError(f"`mtp=follow`: {problem}", hint="`mtp=drop` leaves the layers out")
    warning = f"the multi-token-prediction layers ({len(tensors.names)} tensors) are left out: {problem}"
    return MtpFate(mode="drop", tensors=tensors, warning=warning)
