"""Multi-token-prediction (MTP) modules get fewer experts as any layer does, behind the original and the new trunk."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from moetools.formats.reader import PackedCheckpoint
from moetools.forward.calibrate import ModelStatistics, calibration_plan, collect_statistics
from moetools.forward.memory import MemoryPlan
from moetools.forward.mtp import MtpModel, MtpModule, TrunkStates, run_module, shifted
from moetools.forward.options import ForwardOptions
from moetools.forward.packed_layer import packed_layer
from moetools.forward.progress import Progress
from moetools.passes.layer_equations import chosen_rows, first_sequences
from moetools.passes.layer_reduction import LayerReducer, ReducedLayer, sequential_statistics
from moetools.passes.recipes import Candidate
from moetools.passes.sequential import ROUTER_TOKENS
from moetools.passes.two_streams import streams_plan
from moetools.text.tokens import TokenData


@dataclass(frozen=True, kw_only=True)
class Trunks:
    """What both trunks came to on the text.

    Attributes:
        data: the trunks' text, or behind a module the same without a first token.
        before, after: of the original and of the new model.
        top_before, top_after: what each trunk thinks the most likely next token, [B, N] per batch of `data`.
    """

    data: TokenData
    before: TrunkStates
    after: TrunkStates
    top_before: list[Tensor]
    top_after: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class ReducedModule:
    """A module on its way out.

    Attributes:
        tensors: its layer's by name on disk, decoded.
        stored: the same as they are stored.
        facts: decision and acceptance, JSON-able.
        behind: what the next module gets; None without text.
    """

    tensors: Mapping[str, Tensor]
    stored: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    behind: Trunks | None


@dataclass(frozen=True, kw_only=True)
class MtpReducer:
    """Reduces a module by a candidate, or by the best of several.

    Attributes:
        experts: how many it keeps.
        packed: the input, if its packed tensors stay as they lie on disk.
        plan: of the run; see `mtp_plan`.
    """

    module: MtpModule
    candidates: tuple[Candidate, ...]
    experts: int
    seed: int
    forward: ForwardOptions
    progress: Progress
    packed: PackedCheckpoint | None = None

    def models(self) -> tuple[MtpModel, MtpModel]:
        """The module as it is, and as it will be."""
        old = MtpModel(self.module, self.forward, progress=self.progress)
        return old, MtpModel(self.module, self.forward, experts=self.experts, progress=self.progress)

    @property
    def one_shot_statistics(self) -> list[str]:
        """What is measured on the original module before anything is decided."""
        return sorted({need for one in self.candidates if not one.recipe.sequential for need in one.method.needs})

    @property
    def needs_text(self) -> bool:
        """Whether it cannot be decided from weights alone."""
        return bool(self.one_shot_statistics) or any(one.needs_streams for one in self.candidates)

    def memory(self, data: TokenData | None, solver: int) -> MemoryPlan:
        """Where the bytes go, the trunks' weights not counted; both trunks' hidden states are kept."""
        old, new = self.models()
        plan = old.memory_plan([], keep_native=True, beside=[new])
        if data is None:
            return plan
        if self.one_shot_statistics:
            plan = plan.covering(calibration_plan(old, data, self.one_shot_statistics))
        names = sequential_statistics(self.candidates)
        streams = streams_plan(old, new, data, names, sample_tokens=ROUTER_TOKENS, solver=solver)
        plan = plan.covering(streams)
        return replace(plan, rooms=plan.rooms + 2)

    def reduce(self, trunks: Trunks | None, plan: MemoryPlan) -> ReducedModule:
        """Choose the module's experts and make its new layer."""
        old, new = self.models()
        old.stock.check_names()
        if trunks is None:
            layer = self._reduced(old, new, None, plan)
            return self._made(old, layer, self._facts(layer), None)
        old.behind(trunks.before.hidden)
        new.behind(trunks.after.hidden)
        data = shifted(trunks.data)
        layer = self._reduced(old, new, data, plan)
        behind = Trunks(
            data=data,
            before=run_module(old, layer.native, data.batches, plan),
            after=run_module(new, layer.tensors, data.batches, plan),
            top_before=[top_BN[:, 1:] for top_BN in trunks.top_before],
            top_after=[top_BN[:, 1:] for top_BN in trunks.top_after],
        )
        facts = {**self._facts(layer), "acceptance": accepted(behind)}
        return self._made(old, layer, facts, behind)

    def _reduced(self, old: MtpModel, new: MtpModel, data: TokenData | None, plan: MemoryPlan) -> ReducedLayer:
        statistics: ModelStatistics | None = None
        if data is not None and self.one_shot_statistics:
            statistics = collect_statistics(old, data, ["load", *self.one_shot_statistics], plan)
        reducer = LayerReducer(
            candidates=self.candidates,
            arch=old.arch,
            keep=self.experts,
            num_groups=old.arch.num_groups(new.config),
            seed=self.seed,
            statistics=statistics,
            protected={},
        )
        if not any(one.needs_streams for one in self.candidates):
            (layer,) = reducer.layer_by_layer(old, prefetch=False)
        else:
            assert data is not None
            (layer,) = reducer.stream_by_stream(old, new, data, plan)
        return layer

    def _made(
        self, old: MtpModel, layer: ReducedLayer, facts: Mapping[str, Any], behind: Trunks | None
    ) -> ReducedModule:
        assert layer.weights is not None
        assert layer.decision is not None
        origin = self.module.checkpoint.origin
        plain = old.stock.disk_tensors(0, layer.native, layer.weights)
        tensors = stored = {origin[name]: tensor for name, tensor in plain.items()}
        if self.packed is not None:
            stored = packed_layer(old.stock, 0, layer.native, layer.weights, layer.decision.kept, self.packed, origin)
        return ReducedModule(tensors=tensors, stored=stored, facts=facts, behind=behind)

    def _facts(self, layer: ReducedLayer) -> dict[str, Any]:
        assert layer.decision is not None
        return {"layer": self.module.layer, "decision": asdict(layer.decision), "acceptance": None}


def accepted(behind: Trunks) -> dict[str, Any]:
    """The acceptance rate of greedy drafts: how often a module's most likely token is its trunk's own.

    Counted on the held-out sequences (`chosen_rows`), on all where there are fewer than seven: at every position i
    whose draft and whose trunk's choice are for the same place, given the text so far.

    Returns:
        "before" and "after", shares of "positions"; "held_out", whether those are of held-out sequences.
    """
    batches, first = behind.data.batches, first_sequences(behind.data.batches)
    held = [chosen_rows(batch, start, True) for batch, start in zip(batches, first, strict=True)]
    is_held = any(bool(rows_T.any()) for rows_T in held)
    if not is_held:
        held = [chosen_rows(batch, start, False) for batch, start in zip(batches, first, strict=True)]
    masks = [rows_T.view(batch.input_ids.shape).cpu() for rows_T, batch in zip(held, batches, strict=True)]
    before = _agreeing(behind.before.top, behind.top_before, masks)
    after = _agreeing(behind.after.top, behind.top_after, masks)
    positions = sum(int(mask_BN.sum()) for mask_BN in masks)
    return {
        "before": before / max(1, positions),
        "after": after / max(1, positions),
        "positions": positions,
        "held_out": is_held,
    }


def _agreeing(drafts: Sequence[Tensor], tops: Sequence[Tensor], masks: Sequence[Tensor]) -> int:
    return sum(
        int(((draft_BN == top_BN) & mask_BN).sum())
        for draft_BN, top_BN, mask_BN in zip(drafts, tops, masks, strict=True)
    )
