"""A family's own routing rule: run with some experts' router rows, or with other logits than its own.

Nothing about a family's scoring is written down here; its router's own forward computes every result.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from moetools.architectures.base import Architecture
from moetools.errors import UnsupportedModelError, UserError

_PROBES = 64
_SAME = 1e-3


@dataclass(frozen=True)
class Routed:
    """What a router says about T tokens, experts numbered as in the whole layer."""

    logits_TE: Tensor
    index_TK: Tensor
    weight_TK: Tensor


class RouterRule:
    """A family's own routing, among all experts or some of them, of its own logits or of others.

    Args:
        router: the stock router module.
        rest: what the block hands it beside the hidden states (MiniMax: the correction bias).
    """

    def __init__(self, router: nn.Module, arch: Architecture, rest: tuple[Any, ...]) -> None:
        self._router: Any = router
        self._arch, self._rest = arch, rest

    @property
    def top_k(self) -> int:
        return int(self._router.top_k)

    def among(self, kept_N: Int[Tensor, "N"], fields: Mapping[str, Tensor]) -> "RouterRule":
        """The same with only these experts' rows, as a checkpoint that has only them; `fields` replace the rows."""
        arch = self._arch
        count = number_of_experts(self._router)
        clone: Any = _clone(self._router)
        clone.num_experts = len(kept_N)
        paths = {f"{arch.router}.weight": "router_ED", arch.router_bias: "router_bias_E"}
        paths[arch.correction_bias] = "correction_bias_E"
        for path, field in paths.items():
            inside = _inside_router(path, arch)
            if inside is None or not _has(clone, inside):
                continue
            old = _get(clone, inside)
            dim = 0 if field == "router_ED" else old.dim() - 1
            new = old.index_select(dim, kept_N.to(old.device))
            if field in fields:
                new = fields[field].to(old.device, old.dtype).reshape(new.shape)
            _put(clone, inside, new)
        rest = tuple(_sliced_argument(value, count, kept_N, fields) for value in self._rest)
        return RouterRule(clone, arch, rest)

    def __call__(self, hidden_TD: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Routed:
        """The family's routing; `change` gets the logits and returns those to route by."""
        if change is None:
            return Routed(*parts_of(self._forward(hidden_TD)))
        with _Logits(change) as logits:
            output = self._forward(hidden_TD)
        if logits.count != 1:
            raise UnsupportedModelError(
                f"the router of '{self._arch.model_type}' does not compute its logits by one linear layer",
                hint="sentence- and sequence-level routing need that",
            )
        return Routed(*parts_of(output))

    def logits(self, hidden_TD: Tensor) -> Float[Tensor, "T E"]:
        """The router's own logits, in the dtype it computes them in."""
        found: list[Tensor] = []

        def keep(logits_TE: Tensor) -> Tensor:
            found.append(logits_TE)
            return logits_TE

        self(hidden_TD, keep)
        return found[0]

    def all_weights(self, hidden_TD: Tensor, logits_TE: Tensor) -> Float[Tensor, "T E"]:
        """The weight every expert would have if top-k were all of them and there were no groups."""
        clone: Any = _clone(self._router)
        clone.top_k = logits_TE.shape[1]
        for name in ("num_group", "topk_group", "n_group"):
            if getattr(clone, name, None) is not None:
                setattr(clone, name, 1)
        routed = RouterRule(clone, self._arch, self._rest)(hidden_TD, lambda _: logits_TE)
        if routed.index_TK.shape != logits_TE.shape:
            raise UnsupportedModelError(
                f"the router of '{self._arch.model_type}' gives no weight to experts it does not choose",
                hint="use weights 'unit' with a mean",
            )
        return torch.zeros_like(routed.weight_TK).scatter(1, routed.index_TK, routed.weight_TK)

    def renormalises(self) -> bool:
        """Whether the chosen experts' weights always have the same sum; found by trying random logits."""
        weight = _get(self._router, "weight")
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(_PROBES, weight.shape[0], generator=generator).to(weight.device)
        hidden = torch.zeros(_PROBES, weight.shape[1], dtype=weight.dtype, device=weight.device)
        chosen_T = self(hidden, lambda own: logits.to(own.dtype)).weight_TK.float().sum(1)
        dense_T = self.all_weights(hidden, logits).float().sum(1)
        return bool(((chosen_T - dense_T).abs() <= _SAME * dense_T.abs()).all())

    def choice_scores(self, logits_BNE: Float[Tensor, "B N E"]) -> Float[Tensor, "B N E"]:
        """What experts are chosen by, comparable between tokens: softmax or sigmoid, plus a correction bias."""
        if (
            getattr(self._router, "num_group", None) not in (None, 1)
            and getattr(self._router, "topk_method", "") != "greedy"
        ):
            raise UserError("pool 'seq-topk' does not know router groups", hint="use a mean")
        sigmoid = self._arch.scoring == "sigmoid"
        score_BNE = logits_BNE.float().sigmoid() if sigmoid else logits_BNE.float().softmax(2)
        inside = _inside_router(self._arch.correction_bias, self._arch)
        if inside is not None and _has(self._router, inside):
            return score_BNE + _get(self._router, inside).float().reshape(-1)
        biases = [value for value in self._rest if isinstance(value, Tensor) and value.dim() == 1]
        return score_BNE + biases[0].float() if biases else score_BNE

    def _forward(self, hidden_TD: Tensor) -> Any:
        return type(self._router).forward(self._router, hidden_TD, *self._rest)


class _Logits(TorchFunctionMode):
    """Replaces the result of every linear layer that runs while it is open, and counts them."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._change, self.count = change, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not functional.linear:
            return result
        self.count += 1
        return self._change(result)


def parts_of(output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, index, weights) of what a router returned; Granite before transformers 5.23 turns the order round."""
    if not isinstance(output, tuple) or len(output) != 3:
        raise UnsupportedModelError("this family's router does not return logits, weights and experts")
    first, weights, last = output
    return (first, last, weights) if first.is_floating_point() else (last, first, weights)


def in_whole_layer(routed: Routed, kept_N: Tensor, num_experts: int) -> Routed:
    """The same with experts numbered as in the whole layer; the others' logits are -inf."""
    logits_TE = routed.logits_TE.new_full((len(routed.logits_TE), num_experts), -torch.inf)
    logits_TE[:, kept_N] = routed.logits_TE
    return Routed(logits_TE, kept_N[routed.index_TK], routed.weight_TK)


def number_of_experts(router: Any) -> int:
    """Rows of the router, whatever its attributes say."""
    return _get(router, "weight").shape[0]


def _inside_router(path: str | None, arch: Architecture) -> str | None:
    """A tensor's path inside the router module, from its path inside the MoE block; None if it is not in there."""
    prefix = f"{arch.router}."
    return path.removeprefix(prefix) if path is not None and path.startswith(prefix) else None


def _sliced_argument(value: Any, count: int, kept_N: Tensor, fields: Mapping[str, Tensor]) -> Any:
    """A correction bias that the block hands to its router."""
    if not isinstance(value, Tensor) or value.shape[-1] != count:
        return value
    replaced = fields.get("correction_bias_E")
    sliced = value.index_select(value.dim() - 1, kept_N.to(value.device))
    return sliced if replaced is None else replaced.to(value.device, value.dtype).reshape(sliced.shape)


def _clone(module: Any) -> Any:
    """A copy that shares tensors, down to submodules, and may be given others; without a steered forward."""
    clone = copy.copy(module)
    clone.__dict__ = dict(module.__dict__)
    clone.__dict__.pop("forward", None)
    clone._parameters, clone._buffers = dict(module._parameters), dict(module._buffers)
    clone._modules = {name: _clone(child) for name, child in module._modules.items()}
    return clone


def _has(module: nn.Module, path: str) -> bool:
    owner, _, leaf = path.rpartition(".")
    try:
        return getattr(module.get_submodule(owner), leaf, None) is not None
    except AttributeError:
        return False


def _get(module: nn.Module, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _put(module: nn.Module, path: str, tensor: Tensor) -> None:
    owner, _, leaf = path.rpartition(".")
    place = module.get_submodule(owner)
    # Not as a parameter: a slice of one keeps its gradient's way back to the whole.
    place._parameters.pop(leaf, None)
    place._buffers.pop(leaf, None)
    place.__dict__[leaf] = tensor
