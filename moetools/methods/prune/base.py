"""The contract of a pruning method: a score per expert, the best of each router group stay."""

from abc import abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from moetools.errors import UserError
from moetools.methods.base import ExpertDecision, ExpertMethod, ExpertTarget, LayerStatistics


class ScorePrune(ExpertMethod):
    """Keeps the `keep / num_groups` experts of each router group that score highest; ties go to the lower index.

    Kept experts stay in ascending order, so router groups stay where they are. `details["scores"]` holds all E scores.
    """

    @abstractmethod
    def scores(self, statistics: LayerStatistics, target: ExpertTarget) -> Float[Tensor, "E"]:
        """The score of every expert, higher is worth more; finite."""

    def plan(self, statistics: LayerStatistics, target: ExpertTarget) -> ExpertDecision:
        scores = self.scores(statistics, target).tolist()
        kept: list[int] = []
        for members in target.group_members():
            ranked = sorted(members, key=lambda expert: (-scores[expert], expert))
            kept += sorted(ranked[: target.keep_per_group])
        return keep_decision(kept, {"scores": scores})


def keep_exactly(kept: Sequence[int], target: ExpertTarget) -> ExpertDecision:
    """The decision that keeps a given list of experts, in ascending order.

    Raises:
        UserError: an expert is listed twice or does not exist, the list does not have `target.keep` entries, or the
            router groups would keep different numbers of experts.
    """
    where = f"layer {target.layer}"
    outside = [expert for expert in kept if not 0 <= expert < target.num_experts]
    if outside:
        raise UserError(f"{where}: no expert {outside[0]}; legal: 0 to {target.num_experts - 1}")
    twice = sorted({expert for expert in kept if kept.count(expert) > 1})
    if twice:
        raise UserError(f"{where}: expert {twice[0]} is listed more than once")
    if len(kept) != target.keep:
        raise UserError(f"{where}: {len(kept)} experts listed, {target.keep} wanted")
    counts = [sum(expert in members for expert in kept) for members in target.group_members()]
    if len(set(counts)) > 1:
        raise UserError(
            f"{where}: the router groups would keep {', '.join(map(str, counts))} experts",
            hint=f"list {target.keep_per_group} experts of each of the {target.num_groups} groups",
        )
    return keep_decision(sorted(kept), {})


def keep_decision(kept: Sequence[int], details: dict[str, object]) -> ExpertDecision:
    """Every kept expert alone in its cluster, its router row unchanged."""
    clusters = tuple((expert,) for expert in kept)
    return ExpertDecision(clusters=clusters, weights=((1.0,),) * len(clusters), router="centroid", details=details)
