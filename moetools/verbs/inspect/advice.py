"""Advice in words, from the numbers of a routing report; every limit is a constant of this file or named beside it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from moetools.pipeline.table import Table
from moetools.statistics.base import State
from moetools.verbs.inspect.layer_routing import MIN_EXPECTED_SLOTS, STARVED_SHARE, LayerRouting
from moetools.verbs.inspect.left_out import MIN_SEQUENCES, Estimate, LeftOut, left_out
from moetools.verbs.inspect.shared import LIKE_SHARED_SHARE

COLLAPSED_SHARE = 0.25
"""A layer is collapsed if its effective experts are fewer than this part of all its experts."""
FEW_SHARE = 0.25
"""A task has few effective experts if their median over the layers is below this part of all experts."""
LEFT_OUT = 0.05
"""Experts may go if they serve less than this share of the slots, mean over the layers, with 95 % confidence."""
PAYS = 0.6
"""A task pays if half of the experts, chosen for it, leave out at most this part of what they do chosen for all."""
ALONE = 1.5
"""A layer is left alone if dropping half of its experts costs it more than this times the layers' mean."""
SIGNIFICANT = 0.05
_NAMED = 6


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One sentence or two.

    Attributes:
        about: "unusual", "merge or prune", "route-tasks" or "leave alone".
        text: what is said.
        layers: decoder layers it speaks of; empty: of all.
        tasks: tasks it speaks of; empty: of all.
    """

    about: str
    text: str
    layers: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What advice is made of.

    Attributes:
        sequence_loads: the layers' "sequence_load", in their order.
        groups: router groups; the number of experts must be a multiple of it.
    """

    layers: Sequence[LayerRouting]
    tasks: Sequence[str]
    num_experts: int
    top_k: int
    groups: int
    sequence_loads: Sequence[State]
    seed: int

    @property
    def counts(self) -> list[int]:
        """Numbers of experts that a layer may be reduced to, ascending."""
        return [n for n in range(max(self.top_k, self.groups), self.num_experts) if n % self.groups == 0]

    @property
    def half(self) -> int:
        """The one of `counts` that is nearest to half of the experts."""
        return min(self.counts, key=lambda count: (abs(2 * count - self.num_experts), count))


def advise(facts: Facts) -> tuple[Advice, ...]:
    """What the statistics say to do, most unusual first."""
    pooled = left_out(facts.sequence_loads, seed=facts.seed)
    return (
        *_dead(facts),
        *_collapsed(facts),
        *_like_shared(facts),
        *_few(facts),
        *_fewer_experts(facts, pooled),
        *_by_task(facts, pooled),
        *_left_alone(facts, pooled),
    )


def advice_table(advice: Sequence[Advice]) -> Table:
    """One row per piece of advice."""
    note = "from shares of slots alone: what a smaller model loses, the command itself and evaluate measure"
    return Table(title="advice", columns=["about", "advice"], rows=[[one.about, one.text] for one in advice], note=note)


def _dead(facts: Facts) -> Iterator[Advice]:
    judged = [layer for layer in facts.layers if layer.pooled.starved is not None]
    if not judged:
        least = MIN_EXPECTED_SLOTS * facts.num_experts
        yield Advice(about="unusual", text=f"Too little text to call experts unused: a layer needs {least:,} slots.")
        return
    every = facts.num_experts * len(judged)
    dead = {layer.index: [e for e, count in enumerate(layer.pooled.slots) if not count] for layer in judged}
    dead = {index: experts for index, experts in dead.items() if experts}
    if dead:
        # Rule of three: with none of n sequences, fewer than 3 / n of all with 95 % confidence.
        bound = min(1, 3 / len(facts.sequence_loads[0]["slots"]))
        text = (
            f"{sum(map(len, dead.values()))} of {every} experts got no token ({_placed(dead)}); with 95 % confidence "
            f"fewer than {bound:.1%} of such sequences use any one of them. Here, pruning them changes nothing."
        )
        yield Advice(about="unusual", text=text, layers=tuple(dead))
    weak = {layer.index: [e for e in layer.pooled.starved or () if layer.pooled.slots[e]] for layer in judged}
    weak = {index: experts for index, experts in weak.items() if experts}
    if weak:
        text = (
            f"{sum(map(len, weak.values()))} of {every} experts get tokens, but less than {STARVED_SHARE:.0%} of the "
            f"even share ({_placed(weak)})."
        )
        yield Advice(about="unusual", text=text, layers=tuple(weak))


def _collapsed(facts: Facts) -> Iterator[Advice]:
    limit = COLLAPSED_SHARE * facts.num_experts
    found = {layer.index: layer.pooled.effective for layer in facts.layers if layer.pooled.effective < limit}
    if found:
        worst = min(found, key=lambda index: found[index])
        text = (
            f"{_layers(list(found))}: collapsed, fewer than {limit:g} effective experts of {facts.num_experts} "
            f"({found[worst]:.1f} in layer {worst})."
        )
        yield Advice(about="unusual", text=text, layers=tuple(found))


def _like_shared(facts: Facts) -> Iterator[Advice]:
    alike = {layer.index: [one.expert for one in layer.shared.like_shared] for layer in facts.layers}
    found = {index: experts for index, experts in alike.items() if experts}
    if found:
        text = (
            f"Routed experts that act like shared ones ({_placed(found)}): at least {LIKE_SHARED_SHARE:.0%} of every "
            "task's tokens choose them. Keep them as they are."
        )
        yield Advice(about="unusual", text=text, layers=tuple(found))


def _few(facts: Facts) -> Iterator[Advice]:
    limit = FEW_SHARE * facts.num_experts
    medians = {task: median(layer.tasks[task].effective for layer in facts.layers) for task in facts.tasks}
    few = {task: value for task, value in medians.items() if value < limit}
    if few:
        said = ", ".join(f"{task} {value:.1f}" for task, value in few.items())
        text = f"Tasks whose median of effective experts is below {limit:g} of {facts.num_experts}: {said}."
        yield Advice(about="unusual", text=text, tasks=tuple(few))


def _fewer_experts(facts: Facts, pooled: LeftOut | None) -> Iterator[Advice]:
    if not facts.counts:
        return
    if pooled is None:
        text = f"Too few sequences to say to how many experts: {2 * MIN_SEQUENCES} are needed."
        yield Advice(about="merge or prune", text=text)
        return
    enough = pooled.enough(LEFT_OUT, counts=facts.counts)
    if enough is None:
        most = facts.counts[-1]
        said = f"No expert is spare: {most} of {facts.num_experts} leave out {_percent(pooled.of(most))} of slots"
    else:
        said = f"{enough} of {facts.num_experts} experts per layer leave out {_percent(pooled.of(enough))} of slots"
    even = 1 - facts.half / facts.num_experts
    text = (
        f"{said}; {facts.half} leave out {_percent(pooled.of(facts.half))}, {even:.0%} if all were used evenly. Up to "
        f"{LEFT_OUT:.0%} are a case for prune-experts, more for merge-experts."
    )
    yield Advice(about="merge or prune", text=text)


def _by_task(facts: Facts, pooled: LeftOut | None) -> Iterator[Advice]:
    if len(facts.tasks) < 2 or pooled is None or not facts.counts:
        return
    found = {
        task: one.of(facts.half)
        for number, task in enumerate(facts.tasks)
        if (one := left_out(facts.sequence_loads, seed=facts.seed, task=number)) is not None
    }
    if not found:
        text = f"Too few sequences to say for which tasks: {2 * MIN_SEQUENCES} of each are needed."
        yield Advice(about="route-tasks", text=text)
        return
    together = pooled.of(facts.half).value
    apart = [one.index for one in facts.layers if one.specialization and one.specialization.p_value <= SIGNIFICANT]
    pays = {task: cost for task, cost in found.items() if cost.high <= PAYS * together}
    beside = (
        f"{facts.half} experts per layer of all tasks' choice leave out {together:.1%}; tasks differ in "
        f"{len(apart)} of {len(facts.layers)} layers (p <= {SIGNIFICANT:g})."
    )
    if pays and 2 * len(apart) > len(facts.layers):
        said = ", ".join(
            f"{task} {cost.value:.1%}" for task, cost in sorted(pays.items(), key=lambda one: one[1].value)
        )
        text = (
            f"It would pay for these, whose own {facts.half} experts leave out so much of their slots: {said}. {beside}"
        )
        yield Advice(about="route-tasks", text=text, tasks=tuple(pays))
    else:
        best = min(found, key=lambda task: found[task].value)
        text = f"It would pay for no task: the best, {best}, leaves out {_percent(found[best])} of its slots. {beside}"
        yield Advice(about="route-tasks", text=text)


def _left_alone(facts: Facts, pooled: LeftOut | None) -> Iterator[Advice]:
    if pooled is None or not facts.counts or len(facts.layers) < 2:
        return
    mean = pooled.of(facts.half).value
    costs = {layer.index: pooled.of_layer(place, facts.half) for place, layer in enumerate(facts.layers)}
    alone = [index for index, cost in costs.items() if cost.low > ALONE * mean]
    if alone:
        worst = max(alone, key=lambda index: costs[index].value)
        text = (
            f"{_layers(alone)}: reduce least. {facts.half} experts leave out {_percent(costs[worst])} of slots in "
            f"layer {worst}, {mean:.1%} in the mean layer (said from {ALONE:g} times that)."
        )
        yield Advice(about="leave alone", text=text, layers=tuple(alone))


def _percent(share: Estimate) -> str:
    return f"{share.value:.1%} (95 %: {share.low:.1%} to {share.high:.1%})"


def _layers(indices: Sequence[int]) -> str:
    more = f" and {len(indices) - _NAMED} more" if len(indices) > _NAMED else ""
    return f"{'Layer' if len(indices) == 1 else 'Layers'} {', '.join(map(str, indices[:_NAMED]))}{more}"


def _placed(experts: Mapping[int, Sequence[int]]) -> str:
    """Experts by layer, the first few of them."""
    each = [
        f"layer {index}: {' '.join(map(str, some[:_NAMED]))}{' ...' if len(some) > _NAMED else ''}"
        for index, some in experts.items()
    ]
    more = f"; {len(each) - _NAMED} more layers" if len(each) > _NAMED else ""
    return "; ".join(each[:_NAMED]) + more
