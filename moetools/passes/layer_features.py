"""A layer's least-squares problems over the stored streams: features made for every pass, or kept while they fit."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.architectures.weights import WideExpert
from moetools.forward.activations import Activations
from moetools.forward.experts import RoutedCall
from moetools.forward.streaming import StreamedModel
from moetools.methods.conjugate import FeatureProblem, FeatureRows
from moetools.passes.layer_equations import Activate, intermediate

_ROWS = 8192


class Streams(Protocol):
    """What a layer's problem is made of: inputs of its experts, and what they should add, batch by batch."""

    @property
    def original(self) -> StreamedModel:
        """Where the computing is done."""

    @property
    def inputs(self) -> Activations:
        """What the experts see, [B, N, D]."""

    def wanted(self, number: int) -> Float[Tensor, "T D"]:
        """What they should add for each token of a batch, fp32."""

    def rows(self, number: int, held: bool) -> Tensor:
        """Flat mask of the real tokens of a batch that are (not) held out."""


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Which tokens of some batches go to which new expert [S], and with what weight [S]; by expert."""

    tokens: Sequence[Tensor]
    weights: Sequence[Tensor]

    @classmethod
    def of(cls, call: RoutedCall) -> "Routes":
        counts = call.counts_E.tolist()
        return cls(tokens=call.token_S.split(counts), weights=call.weight_S.split(counts))

    @classmethod
    def everywhere(cls, num_tokens: int, device: torch.device) -> "Routes":
        """Every token goes to the one expert there is, with weight 1."""
        return cls(tokens=[torch.arange(num_tokens, device=device)], weights=[torch.ones(num_tokens, device=device)])

    def unweighted(self, expert: int) -> "Routes":
        """Those of one expert, as if it were the only one."""
        return Routes(tokens=[self.tokens[expert]], weights=[torch.ones_like(self.weights[expert])])

    def chosen(self, rows_T: Tensor, start: int) -> "Routes":
        """The same for some of the tokens, which are counted from `start`."""
        place_T = rows_T.long().cumsum(0) + (start - 1)
        masks = [rows_T[token_S] for token_S in self.tokens]
        return Routes(
            tokens=[place_T[token_S[mask]] for token_S, mask in zip(self.tokens, masks, strict=True)],
            weights=[weight_S[mask] for weight_S, mask in zip(self.weights, masks, strict=True)],
        )

    @classmethod
    def joined(cls, parts: Sequence["Routes"]) -> "Routes":
        return cls(
            tokens=[torch.cat(tokens) for tokens in zip(*(part.tokens for part in parts), strict=True)],
            weights=[torch.cat(weights) for weights in zip(*(part.weights for part in parts), strict=True)],
        )


@dataclass(kw_only=True)
class _Part:
    """Some batches' chosen tokens side by side, as many as fit, so that every expert's product is a large one."""

    masks: Mapping[int, Tensor]
    routes: Routes
    num_tokens: int
    features: list[Tensor] | None = None


class LayerFeatures(FeatureProblem):
    """Gated intermediates of a layer's new experts, and what the layer should add.

    Args:
        streams: with the layer's inputs and targets.
        routes: by batch number; batches that are not there are left out.
        nbytes: for features that are kept; those that do not fit are computed in every pass.
    """

    def __init__(
        self,
        streams: Streams,
        routes: Mapping[int, Routes],
        experts: Sequence[WideExpert],
        activate: Activate,
        *,
        nbytes: int,
    ) -> None:
        self.widths = [expert.width for expert in experts]
        self._streams, self._experts, self._activate = streams, experts, activate
        self._room = nbytes
        self._parts = {held: list(self._gathered(routes, held)) for held in (False, True)}

    def _gathered(self, routes: Mapping[int, Routes], held: bool) -> Iterator[_Part]:
        masks: dict[int, Tensor] = {}
        found: list[Routes] = []
        count = nbytes = 0
        for number in routes:
            rows_T = self._streams.rows(number, held)
            if not bool(rows_T.any()):
                continue
            chosen = routes[number].chosen(rows_T, count)
            size = sum(len(token_S) * width * 4 for token_S, width in zip(chosen.tokens, self.widths, strict=True))
            if found and (count >= _ROWS or nbytes + size > self._room // 4):
                yield _Part(masks=masks, routes=Routes.joined(found), num_tokens=count)
                masks, found, count, nbytes = {}, [], 0, 0
                chosen = routes[number].chosen(rows_T, 0)
            masks[number] = rows_T
            found.append(chosen)
            count, nbytes = count + int(rows_T.sum()), nbytes + size
        if found:
            yield _Part(masks=masks, routes=Routes.joined(found), num_tokens=count)

    def rows(self, held_out: bool) -> Iterator[FeatureRows]:
        for part in self._parts[held_out]:
            yield FeatureRows(
                tokens=part.routes.tokens,
                features=part.features or self._features(part),
                target=functools.partial(self._target, part),
                num_tokens=part.num_tokens,
            )

    def _hidden(self, part: _Part) -> Float[Tensor, "T D"]:
        device = self._streams.original.device
        inputs = [(self._streams.inputs[number].flatten(0, 1), rows_T) for number, rows_T in part.masks.items()]
        return torch.cat([hidden_TD[rows_T.to(hidden_TD.device)].to(device) for hidden_TD, rows_T in inputs])

    def _features(self, part: _Part) -> list[Tensor]:
        hidden_TD = self._hidden(part)
        found = [
            weight_S[:, None] * intermediate(expert, hidden_TD[token_S], self._activate)
            for expert, token_S, weight_S in zip(self._experts, part.routes.tokens, part.routes.weights, strict=True)
        ]
        nbytes = sum(features.nbytes for features in found)
        if nbytes <= self._room:
            self._room -= nbytes
            part.features = found
        return found

    def _target(self, part: _Part) -> Float[Tensor, "T D"]:
        """What the layer should add, without the biases of the new experts' outputs."""
        target_TD = torch.cat([self._streams.wanted(number)[rows_T] for number, rows_T in part.masks.items()])
        for expert, token_S, weight_S in zip(self._experts, part.routes.tokens, part.routes.weights, strict=True):
            if expert.down_bias_D is not None:
                target_TD.index_add_(0, token_S, -weight_S[:, None] * expert.down_bias_D)
        return target_TD


class MemberFeatures(LayerFeatures):
    """One merged expert's intermediates on its own tokens; wanted is the weighted mean of its members' outputs.

    sum_j share_j * down_j(q_j(x)), without biases and gates; only members with their shares are given.
    """

    def __init__(
        self,
        streams: Streams,
        routes: Mapping[int, Routes],
        expert: WideExpert,
        activate: Activate,
        *,
        members: Sequence[tuple[WideExpert, float]],
        nbytes: int,
    ) -> None:
        super().__init__(streams, routes, [expert], activate, nbytes=nbytes)
        self._members = members

    def _target(self, part: _Part) -> Float[Tensor, "T D"]:
        (token_S,) = part.routes.tokens
        hidden_TD = self._hidden(part)
        hidden_SD = hidden_TD[token_S]
        target_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
        for member, share in self._members:
            target_TD[token_S] += share * (intermediate(member, hidden_SD, self._activate) @ member.down_DW.T)
        return target_TD
