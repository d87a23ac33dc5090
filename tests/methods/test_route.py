"""Scores per task against loops over made-up tokens; expert sets against trying every set."""

import itertools

import pytest
import torch

from moetools.errors import StatisticsError
from moetools.methods.base import ExpertTarget
from moetools.methods.route.base import TaskLabels, count_for_share, keep_best, score_share, union_of, union_size
from moetools.plugins import load_plugin, plugin_names

EXPERTS, TOP_K = 6, 2
NAMES = plugin_names("moetools.methods.route")


def make_tokens(seed=0):
    """(sequence, [(expert, gate, norm, turn), ...]) of every token; sequences of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    for sequence, length in enumerate((5, 9, 3, 7)):
        for _ in range(length):
            experts = torch.randperm(EXPERTS - 1, generator=generator)[:TOP_K].tolist()
            gate, norm = torch.rand(2, TOP_K, generator=generator, dtype=torch.float64).tolist()
            turn = torch.rand(1, generator=generator, dtype=torch.float64).item()
            tokens.append((sequence, list(zip(experts, gate, norm, [turn] * TOP_K, strict=True))))
    return tokens


def statistics_of(tokens):
    """The per-sequence quantities that the scores read."""
    shape = (4, EXPERTS)
    slots = torch.zeros(shape, dtype=torch.int64)
    gate, norm, turned = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    lengths = torch.zeros(4, dtype=torch.int64)
    for sequence, chosen in tokens:
        lengths[sequence] += 1
        for expert, weight, size, turn in chosen:
            slots[sequence, expert] += 1
            gate[sequence, expert] += weight
            norm[sequence, expert] += weight * size
            turned[sequence, expert] += weight * size * turn
    return {
        "load": {"slots": slots},
        "router": {"gate_mass": gate, "tokens": lengths},
        "reap": {"weighted_norm": norm, "slots": slots},
        "easy_ep": {"score_per_task": turned},
    }


def brute_force(name, tokens, task_of, task):
    """The score of every expert for one task, token by token."""
    mine = [(sequence, chosen) for sequence, chosen in tokens if task_of[sequence] == task]
    sequences = sorted({sequence for sequence, _ in mine})
    scores = []
    for expert in range(EXPERTS):
        hits = [slot for _, chosen in mine for slot in chosen if slot[0] == expert]
        if name in ("gate", "token"):
            means = []
            for sequence in sequences:
                own = [chosen for other, chosen in mine if other == sequence]
                value = sum(
                    (slot[1] if name == "gate" else 1 / TOP_K) for chosen in own for slot in chosen if slot[0] == expert
                )
                means.append(value / len(own))
            scores.append(sum(means) / len(means))
        elif name == "frequency":
            scores.append(len(hits) / (TOP_K * len(mine)))
        elif name == "reap":
            scores.append(sum(gate * norm for _, gate, norm, _ in hits) / len(hits) if hits else 0.0)
        elif name == "output":
            scores.append(sum(gate * norm for _, gate, norm, _ in hits))
        else:
            assert name == "easy-ep"
            scores.append(sum(gate * norm * turn for _, gate, norm, turn in hits))
    return scores


@pytest.fixture
def target():
    def make(keep, groups=1, protected=()):
        return ExpertTarget(num_experts=EXPERTS, keep=keep, num_groups=groups, layer=3, protected=protected)

    return make


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_a_loop_over_tokens(name, target):
    tokens, task_of = make_tokens(), [0, 1, 1, 0]
    score = load_plugin("moetools.methods.route", name, kind="score").SCORE
    assert score.name == name
    labels = TaskLabels(task_S=torch.tensor(task_of), num_tasks=2)
    found = score.scores(statistics_of(tokens), target(2), labels)
    expected = [brute_force(name, tokens, task_of, task) for task in (0, 1)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    # The last expert is never chosen: nothing says it is worth keeping.
    assert found[:, -1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_statistic_is_named(name, target):
    score = load_plugin("moetools.methods.route", name, kind="score").SCORE
    labels = TaskLabels(task_S=torch.zeros(4, dtype=torch.int64), num_tasks=1)
    for needed in score.needs:
        statistics = statistics_of(make_tokens())
        del statistics[needed]
        with pytest.raises(StatisticsError, match=f"'{needed}' .* is missing"):
            score.scores(statistics, target(2), labels)


@pytest.mark.parametrize(("keep", "groups"), [(2, 1), (3, 1), (6, 1), (2, 2), (4, 2), (3, 3)])
def test_the_best_set_is_the_best_of_all_sets(keep, groups, target):
    for seed in range(5):
        score = torch.rand(EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        size = EXPERTS // groups
        legal = [
            chosen
            for chosen in itertools.combinations(range(EXPERTS), keep)
            if all(sum(expert // size == group for expert in chosen) == keep // groups for group in range(groups))
        ]
        best = max(legal, key=lambda chosen: sum(score[expert].item() for expert in chosen))
        assert keep_best(score, target(keep, groups)) == best


def test_protected_experts_come_first(target):
    score = torch.tensor([9.0, 8.0, 7.0, 3.0, 2.0, 1.0])
    assert keep_best(score, target(2, protected=(5,))) == (0, 5)
    assert keep_best(score, target(2, groups=2, protected=(5,))) == (0, 5)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.95, 1.0])
def test_top_p_is_the_least_count_that_reaches_the_share(groups, share, target):
    for seed in range(5):
        score = torch.rand(EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        counts = range(groups, EXPERTS + 1, groups)
        reached = {count: score_share(score, keep_best(score, target(count, groups))) for count in counts}
        expected = min(count for count in counts if reached[count] >= share - 1e-9)
        assert count_for_share(score, share, groups) == expected


def test_top_p_without_any_score_needs_all_experts():
    assert count_for_share(torch.zeros(EXPERTS, dtype=torch.float64), 0.5) == EXPERTS


def test_a_union_holds_every_set_and_is_filled_with_the_best_of_the_rest(target):
    score = torch.tensor([[9.0, 1, 0, 0, 5, 0], [0, 0, 40, 30, 0, 25]], dtype=torch.float64)
    sets = [(0, 4), (2, 3)]
    assert union_size(sets, target(1)) == 4
    assert union_size(sets, target(2, groups=2)) == 4
    assert union_of(sets, score, target(4)) == (0, 2, 3, 4)
    # Expert 5 has a quarter of the second task's score, expert 1 a fifteenth of the first's.
    assert union_of(sets, score, target(5)) == (0, 2, 3, 4, 5)


def test_shuffled_labels_keep_the_tasks_sizes():
    labels = TaskLabels(task_S=torch.tensor([0] * 5 + [1] * 9 + [2] * 2), num_tasks=3)
    shuffled = labels.shuffled(torch.Generator().manual_seed(0))
    assert shuffled.sequences_G.tolist() == [5, 9, 2]
    assert not torch.equal(shuffled.task_S, labels.task_S)
