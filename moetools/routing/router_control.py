"""Steer the routers of a stock transformers model: only a task's experts, or the same experts for a whole unit.

A family's own router code runs in every case. It is given the router rows of a task's experts, exactly as an extracted
checkpoint has them, or pooled logits in place of the token's; nothing about its scoring is written down here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from moetools.architectures.base import Architecture
from moetools.errors import UnsupportedModelError, UserError
from moetools.forward.streaming import LoadedLayer, StreamedModel
from moetools.routing.router_rule import Routed, RouterRule, in_whole_layer, number_of_experts, parts_of
from moetools.routing.routing_level import (
    BudgetPool,
    MeanPool,
    RoutingLevel,
    UnitState,
    sentence_units,
    sequence_units,
)
from moetools.text.tokens import TokenBatch


@dataclass(frozen=True, kw_only=True)
class TaskExperts:
    """The experts of one task, and its router where it was tuned.

    Attributes:
        kept: layer -> experts, ascending.
        routers: layer -> fields of `LayerWeights` that replace the sliced router's; empty for the model's own rows.
    """

    kept: Mapping[int, Int[Tensor, "N"]]
    routers: Mapping[int, Mapping[str, Tensor]]


class RouterControl:
    """Takes the place of the routers' forward while it is installed.

    Without tasks and level the routers run as they are, bit for bit. With tasks, a sequence is routed among the experts
    of its task by the family's own router with those experts' rows: what an extracted checkpoint computes.

    Attributes:
        tasks: per sequence of the batch its experts, or None for all; one entry stands for every sequence, and a batch
            whose size is a multiple of their number repeats each in place (as beam search does).
        level: the unit for which experts are chosen.
    """

    def __init__(self, model: nn.Module, arch: Architecture, *, ends_V: Bool[Tensor, "V"] | None = None) -> None:
        self._arch, self._ends_V = arch, ends_V
        self._routers = find_routers(model, arch)
        self._renormalises: dict[int, bool] = {}
        self.tasks: Sequence[TaskExperts | None] = ()
        self.level = RoutingLevel()
        self._unit_BN: Tensor | None = None
        self._shape = (0, 0)
        self._units: UnitState | None = None
        self._pools: dict[tuple[int, int], MeanPool | BudgetPool] = {}
        self._seen: dict[int, Tensor] | None = None

    @property
    def layers(self) -> list[int]:
        return list(self._routers)

    def install(self) -> None:
        """Put this control in front of every router."""
        for index, (_, router) in self._routers.items():
            router.__dict__["forward"] = _Steered(self, index, router)

    def remove(self) -> None:
        """Give the routers back their own forward."""
        for _, router in self._routers.values():
            router.__dict__.pop("forward", None)

    @contextmanager
    def installed(self) -> Iterator["RouterControl"]:
        self.install()
        try:
            yield self
        finally:
            self.remove()

    @contextmanager
    def recording(self) -> Iterator[dict[int, Tensor]]:
        """Layer -> router logits [T, E] of the last forward, all experts and tokens, with the model's own routing."""
        tasks, level = self.tasks, self.level
        self.tasks, self.level, self._seen = (), RoutingLevel(), {}
        try:
            yield self._seen
        finally:
            self.tasks, self.level, self._seen = tasks, level, None

    def begin(
        self, ids_BN: Int[Tensor, "B N"] | None, mask_BN: Bool[Tensor, "B N"], *, continues: bool = False
    ) -> None:
        """Say what the next forward sees.

        Args:
            ids_BN: token ids; only sentences need them.
            mask_BN: true at real tokens.
            continues: the tokens follow those of the forward before (generation with a cache).

        Raises:
            UserError: a level that looks ahead while generating, sentences without token ids or sentence ends, or a
                number of sequences that does not fit the tasks.
        """
        self._shape = tuple(mask_BN.shape)  # type: ignore[assignment]
        if len(self.tasks) > 1 and len(mask_BN) % len(self.tasks):
            raise UserError(
                f"the batch has {len(mask_BN)} sequences, and tasks were set for {len(self.tasks)}",
                hint="set one task for all, or one per sequence",
            )
        if self.level.level == "token":
            return
        if continues and not self.level.causal:
            raise UserError(
                f"routing level '{self.level.label}' cannot generate: the tokens it would look at do not exist yet",
                hint="use reach 'running' or 'previous'",
            )
        if not continues:
            self._units, self._pools = None, {}
        if self.level.level == "sequence":
            self._unit_BN = sequence_units(mask_BN)
            return
        if ids_BN is None or self._ends_V is None:
            raise UserError("sentence-level routing needs token ids and the tokenizer's sentence ends")
        self._unit_BN, self._units = sentence_units(ids_BN, mask_BN, self._ends_V, self._units)

    def route(self, layer: int, router: nn.Module, hidden: Tensor, rest: tuple[Any, ...]) -> Any:
        """The router's output for its input; called in place of its forward."""
        if self._seen is not None:
            output = type(router).forward(router, hidden, *rest)
            self._seen[layer] = parts_of(output)[0].detach()
            return output
        if not any(task is not None for task in self.tasks) and self.level.level == "token":
            return type(router).forward(router, hidden, *rest)
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        groups = self._groups(len(hidden_TD))
        parts = [
            (sequences, self._route_group(layer, router, number, task, sequences, hidden_TD, rest))
            for number, (task, sequences) in enumerate(groups)
        ]
        routed = parts[0][1] if len(parts) == 1 else _join(parts, self._shape)
        example = type(router).forward(router, hidden_TD[:1], *rest)
        return _as_output(routed, example)

    def _groups(self, tokens: int) -> list[tuple[TaskExperts | None, Tensor | None]]:
        """Sequences by the experts they may use; None stands for all sequences."""
        tasks = list(self.tasks) or [None]
        if all(task is tasks[0] for task in tasks):
            return [(tasks[0], None)]
        size, length = self._shape
        assert size * length == tokens, "begin() is called before every forward"
        each = [tasks[sequence * len(tasks) // size] for sequence in range(size)]
        found: list[tuple[TaskExperts | None, list[int]]] = []
        for sequence, task in enumerate(each):
            members = next((members for known, members in found if known is task), None)
            if members is None:
                found.append((task, [sequence]))
            else:
                members.append(sequence)
        return [(task, torch.tensor(members)) for task, members in found]

    def _route_group(
        self,
        layer: int,
        router: nn.Module,
        number: int,
        task: TaskExperts | None,
        sequences: Tensor | None,
        hidden_TD: Tensor,
        rest: tuple[Any, ...],
    ) -> Routed:
        if sequences is not None:
            chosen = hidden_TD.view(*self._shape, -1)[sequences.to(hidden_TD.device)]
            hidden_TD = chosen.flatten(0, 1)
        rule = RouterRule(router, self._arch, rest)
        kept = None
        if task is not None:
            kept = task.kept[layer].to(hidden_TD.device)
            rule = rule.among(kept, task.routers.get(layer, {}))
        if self.level.level == "token":
            routed = rule(hidden_TD)
        else:
            assert self._unit_BN is not None
            unit_BN = self._unit_BN if sequences is None else self._unit_BN[sequences.to(self._unit_BN.device)]
            routed = self._pooled(layer, number, rule, hidden_TD, unit_BN.to(hidden_TD.device))
        return routed if kept is None else in_whole_layer(routed, kept, number_of_experts(router))

    def _pooled(self, layer: int, number: int, rule: RouterRule, hidden_TD: Tensor, unit_BN: Tensor) -> Routed:
        own_TE = rule.logits(hidden_TD)
        own_BNE = own_TE.float().view(*unit_BN.shape, -1)
        level, place = self.level, (layer, number)
        if level.pool == "seq-topk":
            budget = self._pools.setdefault(place, BudgetPool(level.reach, rule.top_k))
            assert isinstance(budget, BudgetPool)
            chosen_BNE = budget(rule.choice_scores(own_BNE), unit_BN)
            return self._any_number(layer, rule, hidden_TD, own_TE, chosen_BNE.flatten(0, 1))
        mean = self._pools.setdefault(place, MeanPool(level.reach))
        assert isinstance(mean, MeanPool)
        pooled_BNE = (
            mean(own_BNE, unit_BN) if level.pool == "mean-logits" else self._mean_probability(mean, own_BNE, unit_BN)
        )
        pooled_TE = pooled_BNE.flatten(0, 1).to(own_TE.dtype)
        routed = rule(hidden_TD, lambda _: pooled_TE)
        if level.weights == "unit":
            return routed
        dense_TE = rule.all_weights(hidden_TD, own_TE)
        weight_TK = dense_TE.gather(1, routed.index_TK)
        if self._is_renormalising(layer, rule):
            weight_TK = weight_TK / weight_TK.sum(1, keepdim=True) * dense_TE.sum(1, keepdim=True)
        return Routed(own_TE, routed.index_TK, weight_TK.to(routed.weight_TK.dtype))

    def _mean_probability(self, mean: MeanPool, own_BNE: Tensor, unit_BN: Tensor) -> Tensor:
        """Logits whose softmax (or sigmoid) is the mean of the tokens'."""
        if self._arch.scoring == "sigmoid":
            return torch.logit(mean(own_BNE.double().sigmoid(), unit_BN)).float()
        return mean(own_BNE.double().softmax(2), unit_BN).log().float()

    def _any_number(self, layer: int, rule: RouterRule, hidden_TD: Tensor, own_TE: Tensor, chosen_TE: Tensor) -> Routed:
        """Every token's own weights of the pairs chosen for it; places it does not use have weight 0."""
        dense_TE = rule.all_weights(hidden_TD, own_TE)
        used_TE = dense_TE * chosen_TE
        if self._is_renormalising(layer, rule):
            total_T1 = used_TE.sum(1, keepdim=True)
            used_TE = used_TE / torch.where(total_T1 > 0, total_T1, 1) * dense_TE.sum(1, keepdim=True)
        width = max(1, int(chosen_TE.sum(1).max()))
        rank_TE = torch.where(chosen_TE, 1.0, 0.0) + dense_TE.float() / dense_TE.float().amax(1, keepdim=True) / 2
        index_TK = rank_TE.topk(width, dim=1).indices
        return Routed(own_TE, index_TK, used_TE.gather(1, index_TK))

    def _is_renormalising(self, layer: int, rule: RouterRule) -> bool:
        if layer not in self._renormalises:
            self._renormalises[layer] = rule.renormalises()
        return self._renormalises[layer]


class SteeredModel(StreamedModel):
    """A streamed model whose routers are steered; evaluation and calibration use it like any other."""

    control: RouterControl | None = None

    def run_layer(self, layer: LoadedLayer, batch: TokenBatch, hidden: Tensor) -> Tensor:
        if self.control is not None:
            mask = batch.attention_mask
            self.control.begin(
                batch.input_ids, torch.ones_like(batch.input_ids, dtype=torch.bool) if mask is None else mask
            )
        return super().run_layer(layer, batch, hidden)


def find_routers(model: nn.Module, arch: Architecture) -> dict[int, tuple[nn.Module, nn.Module]]:
    """Decoder layer -> (MoE block, its router), for a stock causal language model.

    Raises:
        UnsupportedModelError: there is none.
    """
    found = {}
    for name, module in model.named_modules():
        match = re.fullmatch(rf"(?:.*\.)?layers\.(\d+)\.(?:.+)\.{re.escape(arch.experts)}", name)
        if match and hasattr(module, "num_experts"):
            block = model.get_submodule(name.removesuffix(f".{arch.experts}"))
            found[int(match[1])] = (block, block.get_submodule(arch.router))
    if not found:
        raise UnsupportedModelError(f"model_type '{arch.model_type}': no layer has a router and experts")
    return dict(sorted(found.items()))


class _Steered:
    """A router's forward under control."""

    def __init__(self, control: RouterControl, layer: int, router: nn.Module) -> None:
        self._control, self._layer, self._router = control, layer, router

    def __call__(self, hidden_states: Tensor, *rest: Any) -> Any:
        return self._control.route(self._layer, self._router, hidden_states, rest)


def _as_output(routed: Routed, example: Any) -> Any:
    """The router's own order of results."""
    logits, _, _ = parts_of(example)
    if example[0].is_floating_point():
        return routed.logits_TE.to(logits.dtype), routed.weight_TK, routed.index_TK
    return routed.index_TK, routed.weight_TK, routed.logits_TE.to(logits.dtype)


def _join(parts: Sequence[tuple[Tensor | None, Routed]], shape: tuple[int, int]) -> Routed:
    """The rows of all groups of sequences in the order of the batch; shorter choices are filled up with weight 0."""
    width = max(routed.index_TK.shape[1] for _, routed in parts)
    first = parts[0][1]
    logits = first.logits_TE.new_empty(*shape, first.logits_TE.shape[1])
    index = first.index_TK.new_zeros(*shape, width)
    weight = first.weight_TK.new_zeros(*shape, width)
    for sequences, routed in parts:
        assert sequences is not None
        place, own = sequences.to(index.device), routed.index_TK.shape[1]
        logits[place] = routed.logits_TE.view(len(place), shape[1], -1)
        # A filled-up place repeats the first choice, so that no further expert is touched.
        index[place] = routed.index_TK[:, :1].view(len(place), shape[1], 1).expand(-1, -1, width)
        index[place, :, :own] = routed.index_TK.view(len(place), shape[1], own)
        weight[place, :, :own] = routed.weight_TK.view(len(place), shape[1], own)
    return Routed(logits.flatten(0, 1), index.flatten(0, 1), weight.flatten(0, 1))
