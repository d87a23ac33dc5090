"""What a router does with the tokens of each task in one layer: numbers from measured counts.

Letters as in `moetools.shapes`; n_ge are the slots of task g that went to expert e.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moetools.forward.calibrate import ModelStatistics
from moetools.statistics.base import State, ratio
from moetools.verbs.inspect.following import Following, following
from moetools.verbs.inspect.information import mutual_information
from moetools.verbs.inspect.serving import Serving, serving
from moetools.verbs.inspect.shared import SharedWork, shared_work
from moetools.verbs.inspect.similarity import SIMILARITY_NEEDS, Similarity, similarity
from moetools.verbs.inspect.weights_alike import WeightsAlike
from moetools.verbs.inspect.word_use import Decode, WordReport, word_report

STARVED_SHARE = 0.25
"""An expert with less than this part of the uniform share 1 / E gets too little."""
MIN_EXPECTED_SLOTS = 100
"""Below this many slots per expert at uniform load, nothing is said about who gets too little."""
NULL_DRAWS = 200
PAIRS_KEPT = 20
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Routing of one layer for the tokens of one task, or of all tasks together.

    Attributes:
        tokens: T.
        slots, share: n_e and f_e = n_e / (T * K), per expert; shares sum to 1.
        entropy, entropy_share: -sum f_e ln f_e in nats, and divided by ln E (1: uniform).
        effective: exp(entropy), the number of experts that an even load with this entropy would have.
        skew: max f_e / mean f_e = E * max f_e; 1 when balanced, E / K at most.
        probability: P_e, mean router probability per expert.
        balance_loss: E * sum f_e * P_e; f sums to 1, so that balance gives 1 (some codebases let f sum to K).
        z_loss: mean of logsumexp(logits)^2.
        router_entropy: mean over tokens of -sum P_e ln P_e, nats.
        starved: experts with f_e < 0.25 / E; None where a uniform load would give them fewer than 100 slots each.
    """

    tokens: int
    slots: list[int]
    share: list[float]
    entropy: float
    entropy_share: float
    effective: float
    skew: float
    probability: list[float]
    balance_loss: float
    z_loss: float
    router_entropy: float
    starved: list[int] | None


@dataclass(frozen=True, kw_only=True)
class Specialization:
    """How far the tasks of a layer differ in the experts they use, all in nats.

    Attributes:
        mutual_information: I(task; expert) = sum p_ge ln(p_ge / (p_g p_e)), p_ge = n_ge / sum n: tasks weigh as they
            were measured.
        null_mean, null_p95: mean and 95th percentile of I when whole sequences are dealt out to tasks at random, each
            task getting as many as it has (200 permutations): slots of one sequence are not independent.
        p_value: (1 + permutations with I or more) / (1 + permutations).
        js_divergence: [G][G], H((f_g + f_h) / 2) - (H(f_g) + H(f_h)) / 2 for every pair of tasks; ln 2 at most.
    """

    mutual_information: float
    null_mean: float
    null_p95: float
    p_value: float
    js_divergence: list[list[float]]

    @property
    def mean_js(self) -> float:
        """Mean over the pairs of different tasks."""
        tasks = len(self.js_divergence)
        return sum(map(sum, self.js_divergence)) / (tasks * (tasks - 1))


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two experts chosen for the same token, over all tasks.

    Attributes:
        experts: (i, j), i < j.
        tokens, share: N_ij, and N_ij / T.
        second_given_first, first_given_second: N_ij / N_i and N_ij / N_j.
        lift: N_ij * T / (N_i * N_j), 1 if independent. K different experts drawn evenly give `chance_lift`.
    """

    experts: tuple[int, int]
    tokens: int
    share: float
    second_given_first: float
    first_given_second: float
    lift: float


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """One MoE layer: all tokens, each task, and what sets the tasks apart (None with a single task).

    Attributes:
        pairs: the 20 pairs of experts chosen together most often; the statistics file holds all of them.
        serving: capacity, expert choice, and how close the choices are.
        shared: what all tokens have in common: shared experts, and routed ones that act like them.
        following: which expert follows which; None in the first MoE layer, or if it was not measured.
        words: token ids and positions; None if they were not counted.
        similarity: experts that are alike, if it was asked for.
    """

    index: int
    pooled: Routing
    tasks: Mapping[str, Routing]
    specialization: Specialization | None
    pairs: list[Pair]
    serving: Serving
    shared: SharedWork
    following: Following | None = None
    words: WordReport | None = None
    similarity: Similarity | None = None


def null_information(slots_SE: Tensor, task_S: Tensor, *, seed: int, draws: int = NULL_DRAWS) -> Tensor:
    """Mutual information [draws] if task made no difference: the sequences' tasks are permuted, whole sequences stay.

    Args:
        slots_SE: slots of every sequence per expert.
        task_S: its task.
    """
    generator = torch.Generator().manual_seed(seed)
    tasks = int(task_S.max()) + 1
    found = []
    for _ in range(draws):
        dealt_S = task_S[torch.randperm(len(task_S), generator=generator)]
        found.append(mutual_information(slots_SE.new_zeros(tasks, slots_SE.shape[1]).index_add_(0, dealt_S, slots_SE)))
    return torch.stack(found)


def layer_routing(
    statistics: ModelStatistics,
    index: int,
    seed: int,
    decode: Decode | None = None,
    groups: int = 1,
    weights: WeightsAlike | None = None,
) -> LayerRouting:
    """Everything that is said of one layer."""
    quantities = statistics.finalized(index)
    load, router = quantities["load"], quantities["router"]
    tasks = statistics.provenance.tasks
    before = [layer for layer in statistics.layers if layer < index]
    follows = following(quantities["succession"], before[-1]) if before and "succession" in quantities else None
    words = None
    if "word_use" in quantities:
        top_k = statistics.shape.top_k
        words = word_report(quantities["word_use"], statistics.token_ids, top_k=top_k, seed=seed, decode=decode)
    asked = quantities.keys() >= set(SIMILARITY_NEEDS)
    rows = {task: slice(number, number + 1) for number, task in enumerate(tasks)}
    return LayerRouting(
        index=index,
        pooled=_routing(load, router, slice(None)),
        tasks={task: _routing(load, router, row) for task, row in rows.items()},
        specialization=specialization(load["slots"], quantities["sequence_load"], seed) if len(tasks) > 1 else None,
        pairs=_top_pairs(quantities["coactivation"]),
        serving=serving(quantities),
        shared=shared_work(quantities),
        following=follows,
        words=words,
        similarity=similarity(quantities, groups=groups, weights=weights) if asked else None,
    )


def _routing(load: State, router: State, tasks: slice) -> Routing:
    """Routing over the tokens of the given tasks together."""
    slots_E, tokens = load["slots"][tasks].sum(0), load["tokens"][tasks].sum()
    experts = len(slots_E)
    share_E = ratio(slots_E, slots_E.sum())
    probability_E = ratio(router["probability"][tasks].sum(0), tokens)
    entropy = float(torch.special.entr(share_E).sum())
    enough = int(slots_E.sum()) >= MIN_EXPECTED_SLOTS * experts
    starved = (share_E < STARVED_SHARE / experts).nonzero().squeeze(1)
    return Routing(
        tokens=int(tokens),
        slots=slots_E.tolist(),
        share=share_E.tolist(),
        entropy=entropy,
        effective=math.exp(entropy),
        entropy_share=entropy / math.log(experts) if experts > 1 else 1.0,
        skew=float(experts * share_E.max()),
        probability=probability_E.tolist(),
        balance_loss=float(experts * (share_E * probability_E).sum()),
        z_loss=float(ratio(router["z_squared"][tasks].sum(), tokens)),
        router_entropy=float(ratio(router["entropy"][tasks].sum(), tokens)),
        starved=starved.tolist() if enough else None,
    )


def specialization(slots_GE: Tensor, sequences: State, seed: int) -> Specialization:
    """From the slots of each task and of each sequence."""
    information = float(mutual_information(slots_GE))
    null = null_information(sequences["slots"], sequences["task"], seed=seed)
    share_GE = ratio(slots_GE, slots_GE.sum(1, keepdim=True))
    entropy_G = torch.special.entr(share_GE).sum(1)
    mixed_GG = torch.special.entr((share_GE[:, None] + share_GE) / 2).sum(2)
    js_GG = (mixed_GG - (entropy_G[:, None] + entropy_G) / 2).clamp(min=0).fill_diagonal_(0)
    return Specialization(
        mutual_information=information,
        null_mean=float(null.mean()),
        null_p95=float(null.quantile(0.95)),
        p_value=(1 + int((null >= information - _ROUNDING).sum())) / (1 + len(null)),
        js_divergence=js_GG.tolist(),
    )


def _top_pairs(coactivation: State) -> list[Pair]:
    pairs_EE, conditional_EE = coactivation["pairs"], coactivation["conditional"]
    first, second = torch.triu_indices(len(pairs_EE), len(pairs_EE), offset=1)
    order = pairs_EE[first, second].argsort(descending=True, stable=True)[:PAIRS_KEPT]
    share_EE = ratio(pairs_EE, coactivation["tokens"])
    return [
        Pair(
            experts=(i, j),
            tokens=int(pairs_EE[i, j]),
            share=float(share_EE[i, j]),
            second_given_first=float(conditional_EE[i, j]),
            first_given_second=float(conditional_EE[j, i]),
            lift=float(coactivation["lift"][i, j]),
        )
        for i, j in zip(first[order].tolist(), second[order].tolist(), strict=True)
        if pairs_EE[i, j] > 0
    ]
