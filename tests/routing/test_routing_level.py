"""Pooling of router scores over sentences and sequences, against loops over tokens."""

import pytest
import torch

from moetools.errors import UserError
from moetools.routing.routing_level import (
    BudgetPool,
    MeanPool,
    RoutingLevel,
    sentence_ends,
    sentence_units,
    sequence_units,
)

B, N, E, K = 3, 14, 5, 2
ENDS = torch.zeros(20, dtype=torch.bool)
ENDS[[0, 7]] = True


@pytest.fixture
def case():
    """Scores, token ids, and a mask with padding on the right, on the left, and nowhere."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 20, (B, N), generator=generator)
    ids[:, 4] = 0
    ids[0, 5] = 7
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, 11:] = False
    mask[1, :3] = False
    return torch.randn(B, N, E, generator=generator), ids, mask


def loop_units(ids, mask):
    units = torch.full(ids.shape, -1)
    for row in range(len(ids)):
        unit, ended = -1, True
        for place in range(ids.shape[1]):
            if not mask[row, place]:
                continue
            ends = bool(ENDS[ids[row, place]])
            if unit < 0 or (ended and not ends):
                unit += 1
            units[row, place], ended = unit, ends
    return units


def members(units, row, unit, upto=None):
    return [place for place in range(N) if units[row, place] == unit and (upto is None or place <= upto)]


def loop_mean(value, units, reach):
    pooled = value.clone()
    for row in range(B):
        for place in range(N):
            unit = int(units[row, place])
            if unit < 0:
                continue
            if reach == "lookahead":
                places = members(units, row, unit)
            elif reach == "running" or unit == 0:
                places = members(units, row, unit, place)
            else:
                places = members(units, row, unit - 1)
            pooled[row, place] = value[row, places].double().mean(0).float()
    return pooled


def loop_budget(score, units, reach):
    chosen = torch.zeros(B, N, E, dtype=torch.bool)
    for row in range(B):
        for place in range(N):
            unit = int(units[row, place])
            if unit < 0:
                continue
            places = members(units, row, unit, None if reach == "lookahead" else place)
            values = sorted((score[row, other, expert].item() for other in places for expert in range(E)), reverse=True)
            chosen[row, place] = score[row, place] >= values[len(places) * K - 1]
    return chosen


def in_chunks(pool, value, units, sizes):
    parts, start = [], 0
    for size in sizes:
        parts.append(pool(value[:, start : start + size], units[:, start : start + size]))
        start += size
    assert start == N
    return torch.cat(parts, 1)


def test_sentences_begin_behind_an_end(case):
    _, ids, mask = case
    units, state = sentence_units(ids, mask, ENDS)
    assert torch.equal(units, loop_units(ids, mask))
    assert units[0, 4] == units[0, 5]
    first, before = sentence_units(ids[:, :6], mask[:, :6], ENDS)
    second, after = sentence_units(ids[:, 6:], mask[:, 6:], ENDS, before)
    assert torch.equal(torch.cat([first, second], 1), units)
    assert torch.equal(after.unit_B, state.unit_B)
    assert sequence_units(mask).tolist() == [[0 if real else -1 for real in row] for row in mask.tolist()]


@pytest.mark.parametrize("reach", ["lookahead", "running", "previous"])
def test_means_equal_a_loop(reach, case):
    value, ids, mask = case
    units, _ = sentence_units(ids, mask, ENDS)
    torch.testing.assert_close(MeanPool(reach)(value, units), loop_mean(value, units, reach), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", [[1] * N, [5, 4, 5], [6, 1, 7]])
@pytest.mark.parametrize("reach", ["running", "previous"])
def test_causal_means_do_not_care_about_chunks(reach, sizes, case):
    value, ids, mask = case
    # Padding on the right cannot be followed by a chunk.
    mask[0] = True
    units, _ = sentence_units(ids, mask, ENDS)
    found = in_chunks(MeanPool(reach), value, units, sizes)
    torch.testing.assert_close(found, loop_mean(value, units, reach), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reach", ["lookahead", "running"])
def test_budgets_equal_a_loop(reach, case):
    value, ids, mask = case
    units, _ = sentence_units(ids, mask, ENDS)
    chosen = BudgetPool(reach, K)(value, units)
    assert torch.equal(chosen, loop_budget(value, units, reach))
    if reach == "lookahead":
        for row in range(B):
            for unit in range(int(units[row].max()) + 1):
                places = members(units, row, unit)
                assert int(chosen[row, places].sum()) == K * len(places)


def test_causal_budgets_do_not_care_about_chunks(case):
    value, ids, mask = case
    mask[0] = True
    units, _ = sentence_units(ids, mask, ENDS)
    found = in_chunks(BudgetPool("running", K), value, units, [3, 1, 10])
    assert torch.equal(found, loop_budget(value, units, "running"))


def test_a_unit_of_one_token_pools_to_itself():
    value = torch.randn(2, 6, E)
    units = torch.arange(6).expand(2, -1)
    for reach in ("lookahead", "running"):
        assert torch.equal(MeanPool(reach)(value, units), value)


def test_labels_say_what_looks_ahead():
    assert RoutingLevel().causal
    assert not RoutingLevel(level="sentence").causal
    assert "LOOKS AHEAD" in RoutingLevel(level="sequence", pool="mean-logits").label
    assert "(causal)" in RoutingLevel(level="sentence", reach="previous").label
    for settings in ({"level": "sequence"}, {"level": "sentence", "pool": "seq-topk"}):
        with pytest.raises(UserError, match="'previous' is for sentences with a mean"):
            RoutingLevel(reach="previous", **settings)
    with pytest.raises(UserError, match="routing level 'word'; legal: token, sentence, sequence"):
        RoutingLevel(level="word")


def test_sentence_ends_of_a_tokenizer():
    class Tokenizer:
        texts = ["a", "end.", '?"', " e.g", "\n\n", ". )", "3.5", "\u3002", "..."]

        def __len__(self):
            return len(self.texts)

        def batch_decode(self, rows):
            return [self.texts[row[0]] for row in rows]

    ends = sentence_ends(Tokenizer(), 12)
    assert ends.nonzero()[:, 0].tolist() == [1, 2, 4, 5, 7, 8]
    assert len(ends) == 12
