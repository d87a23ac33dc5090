"""A layer's joint least-squares problem over the stored streams: features made for every pass, or kept while they fit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetools.architectures.weights import WideExpert
from moetools.forward.experts import RoutedCall
from moetools.methods.conjugate import FeatureProblem, FeatureRows
from moetools.passes.layer_equations import Activate, intermediate
from moetools.passes.two_streams import TwoStreams

_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Which tokens of one batch, padding included, go to which new expert, and with what weight."""

    tokens: Sequence[Tensor]
    weights: Sequence[Tensor]

    @classmethod
    def of(cls, call: RoutedCall) -> "Routes":
        counts = call.counts_E.tolist()
        return cls(tokens=call.token_S.split(counts), weights=call.weight_S.split(counts))

    def chosen(self, rows_T: Tensor) -> "Routes":
        """The same for some of the tokens, renumbered."""
        place_T = rows_T.long().cumsum(0) - 1
        masks = [rows_T[token_S] for token_S in self.tokens]
        return Routes(
            tokens=[place_T[token_S[mask]] for token_S, mask in zip(self.tokens, masks, strict=True)],
            weights=[weight_S[mask] for weight_S, mask in zip(self.weights, masks, strict=True)],
        )


@dataclass(kw_only=True)
class _Part:
    """Some batches together: their chosen tokens side by side, so that every expert's product is a large one."""

    numbers: list[int] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    routes: list[Routes] = field(default_factory=list)
    num_tokens: int = 0
    features: list[Tensor] | None = None

    def add(self, number: int, rows_T: Tensor, routes: Routes) -> None:
        chosen = routes.chosen(rows_T)
        self.routes.append(
            Routes(tokens=[token_S + self.num_tokens for token_S in chosen.tokens], weights=chosen.weights)
        )
        self.numbers.append(number)
        self.masks.append(rows_T)
        self.num_tokens += int(rows_T.sum())

    def joined(self) -> Routes:
        """Expert by expert over all batches."""
        return Routes(
            tokens=[torch.cat(parts) for parts in zip(*(one.tokens for one in self.routes), strict=True)],
            weights=[torch.cat(parts) for parts in zip(*(one.weights for one in self.routes), strict=True)],
        )


class LayerFeatures(FeatureProblem):
    """Gated intermediates of a layer's new experts, and what the layer should add.

    Args:
        streams: with the layer's inputs and targets.
        routes: by batch number; batches that are not there are left out.
        nbytes: for features that are kept; those that do not fit are computed in every pass.
    """

    def __init__(
        self,
        streams: TwoStreams,
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
        part = _Part()
        for number, routed in routes.items():
            rows_T = self._streams.rows(number, held)
            if rows_T is None:
                continue
            part.add(number, rows_T, routed)
            if part.num_tokens >= _ROWS:
                yield part
                part = _Part()
        if part.num_tokens:
            yield part

    def rows(self, held_out: bool) -> Iterator[FeatureRows]:
        for part in self._parts[held_out]:
            routes = part.joined()
            yield FeatureRows(
                tokens=routes.tokens,
                features=part.features or self._features(part, routes),
                target=lambda part=part, routes=routes: self._target(part, routes),
                num_tokens=part.num_tokens,
            )

    def _features(self, part: _Part, routes: Routes) -> list[Tensor]:
        device = self._streams.original.device
        inputs = (self._streams.inputs[number].flatten(0, 1) for number in part.numbers)
        hidden_TD = torch.cat(
            [hidden[rows_T.to(hidden.device)].to(device) for hidden, rows_T in zip(inputs, part.masks, strict=True)]
        )
        found = [
            weight_S[:, None] * intermediate(expert, hidden_TD[token_S], self._activate)
            for expert, token_S, weight_S in zip(self._experts, routes.tokens, routes.weights, strict=True)
        ]
        nbytes = sum(features.nbytes for features in found)
        if nbytes <= self._room:
            self._room -= nbytes
            part.features = found
        return found

    def _target(self, part: _Part, routes: Routes) -> Tensor:
        """What the layer should add, without the biases of the new experts' outputs."""
        wanted = [self._streams.wanted(number)[rows_T] for number, rows_T in zip(part.numbers, part.masks, strict=True)]
        target_TD = torch.cat(wanted)
        for expert, token_S, weight_S in zip(self._experts, routes.tokens, routes.weights, strict=True):
            if expert.down_bias_D is not None:
                target_TD.index_add_(0, token_S, -weight_S[:, None] * expert.down_bias_D)
        return target_TD
