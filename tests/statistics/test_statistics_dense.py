"""Every statistic against a dense reference: all experts on all tokens, masked."""

import math
from dataclasses import replace

import pytest
import torch

from moetools.plugins import load_plugin
from moetools.statistics.base import ratio
from moetools.statistics.margin import BOUNDS

CPU = torch.device("cpu")


def measure(name, case, batch=None):
    statistic = load_plugin("moetools.statistics", name, kind="statistic").STATISTIC
    state = statistic.init(case.shape, CPU)
    statistic.update(state, case.batch() if batch is None else batch)
    return statistic.finalize(state)


def per_task(case, value_TE):
    """[G, E]: sum of value over the tokens of each task that chose the expert."""
    masked = value_TE * case.chosen_TE
    return torch.stack([masked[case.of_task(g)].sum(0) for g in range(case.shape.num_tasks)])


# Mixed tasks, one expert without slots; K = 1; one task only; many experts; all experts.
CASES = [
    {"unused": (2,)},
    {"top_k": 1},
    {"tasks": 1, "unused": (0, 5)},
    {"experts": 40, "top_k": 4, "tokens": 80},
    {"top_k": 6},
]


@pytest.fixture(params=CASES, ids=["unused", "k1", "one_task", "e40", "k_is_e"])
def case(request, make_case):
    return make_case(**request.param)


def test_load(case):
    found = measure("load", case)
    expected = per_task(case, torch.ones_like(case.logits_TE)).long()
    assert torch.equal(found["slots"], expected)
    assert found["tokens"].tolist() == [int(case.of_task(g).sum()) for g in range(case.shape.num_tasks)]
    torch.testing.assert_close(found["share"], expected / (found["tokens"][:, None].double() * case.shape.top_k))


def test_router_softmax(case):
    found = measure("router", case)
    probability_TE = case.logits_TE.double().softmax(1)
    entropy_T = -(probability_TE * case.logits_TE.double().log_softmax(1)).sum(1)
    z_T = case.logits_TE.double().exp().sum(1).log() ** 2
    for g in range(case.shape.num_tasks):
        mine = case.of_task(g)
        close = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(found["mean_probability"][g], probability_TE[mine].mean(0), **close)
        torch.testing.assert_close(found["probability"][g], probability_TE[mine].sum(0), **close)
        torch.testing.assert_close(found["mean_entropy"][g], entropy_T[mine].mean(), **close)
        torch.testing.assert_close(found["z_loss"][g], z_T[mine].mean(), **close)
    torch.testing.assert_close(found["gate_mass"], per_task(case, case.gate_TE))


def test_router_sigmoid_scores_are_normalised(make_case):
    case = make_case(scoring="sigmoid", tasks=1)
    found = measure("router", case)
    score_TE = case.logits_TE.double().sigmoid()
    probability_TE = score_TE / score_TE.sum(1, keepdim=True)
    torch.testing.assert_close(found["mean_probability"][0], probability_TE.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["z_loss"][0], (case.logits_TE.double().logsumexp(1) ** 2).mean())


def test_balance_loss_of_a_balanced_router_is_one(make_case):
    case = make_case(tokens=6, tasks=1, top_k=1)
    case.logits_TE.copy_(torch.eye(6))
    case.index_TK.copy_(torch.arange(6)[:, None])
    share, mean = measure("load", case)["share"], measure("router", case)["mean_probability"]
    assert (6 * (share * mean).sum()).item() == pytest.approx(1.0, rel=1e-6)


def test_coactivation_counts_all_pairs(case):
    found = measure("coactivation", case)
    E, T = case.shape.num_experts, len(case.task_T)
    pairs = torch.zeros(E, E, dtype=torch.int64)
    for chosen in case.index_TK.tolist():
        for i in chosen:
            for j in chosen:
                pairs[i, j] += i != j
    assert torch.equal(found["pairs"], pairs)
    n = case.chosen_TE.sum(0).double()
    for i in range(E):
        for j in range(E):
            both = pairs[i, j].item()
            assert found["conditional"][i, j].item() == pytest.approx(both / n[i].item() if n[i] else 0.0)
            joint = both * T / (n[i] * n[j]).item() if n[i] * n[j] > 0 else 0.0
            assert found["lift"][i, j].item() == pytest.approx(joint)


def test_reap(case):
    found = measure("reap", case)
    weighted = per_task(case, case.gate_TE * case.output_TED.norm(dim=2))
    slots = per_task(case, torch.ones_like(case.gate_TE))
    torch.testing.assert_close(found["saliency_per_task"], (weighted / slots).nan_to_num(0.0), rtol=1e-5, atol=1e-7)
    pooled = (weighted.sum(0) / slots.sum(0)).nan_to_num(0.0)
    torch.testing.assert_close(found["saliency"], pooled, rtol=1e-5, atol=1e-7)


def test_ream_saliency(case):
    found = measure("ream_saliency", case)
    weighted = (case.gate_TE.square() * case.output_TED.norm(dim=2) * case.chosen_TE).sum(0)
    expected = (weighted / case.chosen_TE.sum(0)).nan_to_num(0.0)
    torch.testing.assert_close(found["saliency"], expected, rtol=1e-5, atol=1e-7)


def test_ean(case):
    found = measure("ean", case)
    norms = per_task(case, case.output_TED.norm(dim=2))
    torch.testing.assert_close(found["norm_per_task"], norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["norm"], norms.sum(0), rtol=1e-5, atol=1e-6)


def test_mean_output(case):
    found = measure("mean_output", case)
    for e in range(case.shape.num_experts):
        mine = case.output_TED[case.chosen_TE[:, e], e]
        expected = mine.mean(0) if len(mine) else torch.zeros(5, dtype=torch.float64)
        torch.testing.assert_close(found["mean"][e], expected, rtol=1e-5, atol=1e-6)
        assert found["slots"][e].item() == len(mine)


def test_max_activation(case):
    found = measure("max_activation", case)
    peak = (case.output_TED.abs().amax(2) * case.chosen_TE).amax(0)
    torch.testing.assert_close(found["peak"], peak.float())


def test_max_activation_sees_negative_outputs(make_case):
    case = make_case(tokens=1, tasks=1, top_k=1)
    batch = case.batch()
    batch.slots.output_SD.copy_(torch.tensor([[-7.0, 1.0, 2.0, -3.0, 0.5]]))
    assert measure("max_activation", case, batch)["peak"].max().item() == 7.0


def test_bfloat16_outputs_are_reduced_in_fp32(make_case):
    case = make_case(tokens=2000, tasks=1)
    batch = case.batch()
    rounded = batch.slots.output_SD.bfloat16()
    object.__setattr__(batch.slots, "output_SD", rounded)
    norms = rounded.double().norm(dim=1)
    expected = torch.stack([norms[batch.slots.expert_S == e].sum() for e in range(6)])
    torch.testing.assert_close(measure("ean", case, batch)["norm"], expected, rtol=1e-5, atol=0)
    total = torch.stack([rounded.double()[batch.slots.expert_S == e].sum(0) for e in range(6)])
    torch.testing.assert_close(measure("mean_output", case, batch)["total"], total, rtol=1e-4, atol=1e-3)


def test_an_overflow_stays_with_its_expert(make_case):
    case = make_case(tasks=1)
    batch = case.batch()
    batch.slots.output_SD[0] = float("inf")
    culprit = batch.slots.expert_S[0].item()
    for name, key in (("mean_output", "mean"), ("reap", "saliency"), ("ean", "norm"), ("max_activation", "peak")):
        finite = measure(name, case, batch)[key].reshape(6, -1).isfinite().all(1)
        assert finite.tolist() == [e != culprit for e in range(6)], name


def gated_vectors(case):
    """[E, T * D]: every expert's gated outputs over all tokens, zero where it was not chosen."""
    gated_TED = case.gate_TE[:, :, None] * case.output_TED
    return gated_TED.transpose(0, 1).flatten(1)


def test_gated_similarity(case):
    found, vectors = measure("gated_similarity", case), gated_vectors(case)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found["product"], vectors @ vectors.T, **close)
    torch.testing.assert_close(found["energy"], vectors.square().sum(1), **close)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    torch.testing.assert_close(found["cosine"], unit @ unit.T, **close)


def test_outputs_come_by_token_in_runs(make_case):
    # 2^22 / (2 * 5) tokens fit a run; wide outputs make the runs short.
    case = make_case(tokens=9, tasks=1)
    batch = case.batch()
    wide = torch.randn(18, 2**19, generator=torch.Generator().manual_seed(0))
    object.__setattr__(batch.slots, "output_SD", wide)
    runs = list(batch.outputs_by_token())
    assert [len(slots) for _, slots, _ in runs] == [4, 4, 1]
    for rows, slot_NK, output_NKD in runs:
        experts = batch.slots.expert_S[slot_NK]
        assert torch.equal(experts, batch.topk_index_TK[rows].sort(1).values)
        assert torch.equal(batch.slots.token_S[slot_NK], torch.arange(9)[rows, None].expand(-1, 2))
        assert torch.equal(output_NKD, wide[slot_NK])


def test_router_similarity(case):
    found = measure("router_similarity", case)
    used = (case.logits_TE.std(0) > 0).tolist()
    expected = torch.zeros(len(used), len(used), dtype=torch.float64)
    for i, one in enumerate(case.logits_TE.double().T):
        for j, two in enumerate(case.logits_TE.double().T):
            if used[i] and used[j]:
                expected[i, j] = torch.corrcoef(torch.stack([one, two]))[0, 1]
    torch.testing.assert_close(found["similarity"], expected, rtol=1e-9, atol=1e-9)


def test_router_similarity_survives_a_large_common_bias(make_case):
    case, moved = make_case(), make_case()
    moved.logits_TE.copy_((moved.logits_TE * 64).round() / 64 + 1024)  # exact in fp32
    case.logits_TE.copy_((case.logits_TE * 64).round() / 64)
    expected = measure("router_similarity", case)["similarity"]
    torch.testing.assert_close(measure("router_similarity", moved)["similarity"], expected, rtol=0, atol=1e-8)


def test_easy_ep(case):
    found = measure("easy_ep", case)
    norm_TE = case.output_TED.norm(dim=2)
    routed_TD = torch.einsum("te,ted->td", case.gate_TE, case.output_TED)
    before, after = case.hidden_TD.double(), case.hidden_TD.double() + routed_TD
    cosine_T = (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))
    expected = per_task(case, case.gate_TE * norm_TE * (1 - cosine_T)[:, None])
    torch.testing.assert_close(found["score_per_task"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["score"], expected.sum(0), rtol=1e-5, atol=1e-6)


def test_easy_ep_ignores_tokens_whose_direction_stays(make_case):
    case = make_case(tasks=1)
    batch = case.batch()
    batch.slots.output_SD.copy_(case.hidden_TD[batch.slots.token_S] * 3)
    assert measure("easy_ep", case, batch)["score"].abs().max() < 1e-10
    batch.slots.output_SD.mul_(1e-3)
    batch.slots.output_SD[0, 0] += 1e-3  # turned by a milliradian: 1 - cos is 1e-7, beyond fp32
    assert measure("easy_ep", case, batch)["score"].max() > 0


def test_margin(case):
    found = measure("margin", case)
    for task in range(case.shape.num_tasks):
        below, rounding = [0] * len(BOUNDS), 0
        for token in case.of_task(task).nonzero()[:, 0].tolist():
            chosen = set(case.index_TK[token].tolist())
            logits = case.logits_TE[token].tolist()
            least = min(logits[e] for e in chosen)
            other = max((value for e, value in enumerate(logits) if e not in chosen), default=None)
            if other is None:
                continue
            below = [count + (least - other < bound) for count, bound in zip(below, BOUNDS, strict=True)]
            rounding += least - other <= max(abs(least), abs(other)) / 256
        assert found["below"][task].tolist() == below
        assert int(found["rounding"][task]) == rounding
    assert not found["negative"].any()
    torch.testing.assert_close(found["below_share"], ratio(found["below"], found["tokens"][:, None]))


def test_margin_of_choices_by_more_than_logits(make_case):
    case = make_case()
    case.index_TK[:10] = case.logits_TE[:10].topk(2, dim=1, largest=False).indices
    found = measure("margin", case)
    assert int(found["negative"].sum()) == 10
    every = make_case(experts=2, top_k=2)
    assert not measure("margin", every)["below"].any()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_expert_choice(make_case, scoring):
    case = make_case(tokens=47, scoring=scoring)
    found = measure("expert_choice", case)
    score_TE = case.logits_TE.sigmoid() if scoring == "sigmoid" else case.logits_TE.softmax(1)
    for task in range(case.shape.num_tasks):
        rows = case.of_task(task).nonzero()[:, 0]
        capacity = math.ceil(len(rows) * case.shape.top_k / case.shape.num_experts)
        taken = {
            (token, expert)
            for expert in range(case.shape.num_experts)
            for token in rows[score_TE[rows, expert].argsort(descending=True, stable=True)[:capacity]].tolist()
        }
        slots = {(token, expert) for token in rows.tolist() for expert in case.index_TK[token].tolist()}
        assert int(found["kept"][task]) == len(taken & slots)
        assert int(found["orphans"][task]) == len(set(rows.tolist()) - {token for token, _ in taken})
    assert found["kept_share"].max() <= 1


def test_succession_counts_all_pairs_of_two_layers(case):
    found = measure("succession", case)
    E, T = case.shape.num_experts, len(case.task_T)
    pairs = torch.zeros(E, E, dtype=torch.int64)
    for before, now in zip(case.previous_TK.tolist(), case.index_TK.tolist(), strict=True):
        for i in before:
            for j in now:
                pairs[i, j] += 1
    assert torch.equal(found["pairs"], pairs)
    before, now = pairs.sum(1).tolist(), pairs.sum(0).tolist()
    information = 0.0
    for i in range(E):
        for j in range(E):
            count, K = int(pairs[i, j]), case.shape.top_k
            assert found["conditional"][i, j].item() == pytest.approx(count / (before[i] / K) if before[i] else 0)
            lift = count * T * K * K / (before[i] * now[j]) if before[i] * now[j] else 0
            assert found["lift"][i, j].item() == pytest.approx(lift)
            information += count / (T * K * K) * math.log(lift) if count else 0
    assert found["information"].item() == pytest.approx(information, abs=1e-12)


def test_the_first_layer_follows_nobody(make_case):
    case = make_case()
    found = measure("succession", case, replace(case.batch(), previous_TK=None))
    assert not any(value.any() for value in found.values())


def test_shared_output(case):
    found = measure("shared_output", case)
    shared_TD, routed_TD = case.shared_TD.double(), case.routed_TD.double()
    for task in range(case.shape.num_tasks):
        shared = wholes = along = energy = 0.0
        for token in case.of_task(task).nonzero()[:, 0].tolist():
            whole = shared_TD[token] + routed_TD[token]
            shared, wholes = shared + float(shared_TD[token].norm()), wholes + float(whole.norm())
            along, energy = along + float(shared_TD[token] @ whole), energy + float(whole @ whole)
        assert found["norm_share"][task].item() == pytest.approx(shared / wholes, rel=1e-5)
        assert found["carried"][task].item() == pytest.approx(along / energy, rel=1e-4)
    without = measure("shared_output", case, replace(case.batch(), shared_TD=None))
    assert not any(value.any() for value in without.values())


def test_word_use(case):
    found, E = measure("word_use", case), case.shape.num_experts
    words, places = torch.zeros(8, 4, E).long(), torch.zeros(8, 16, E).long()
    for token, chosen in enumerate(case.index_TK.tolist()):
        block = int(case.task_T[token]) % 8  # the test's sequences are its tasks
        for expert in chosen:
            words[block, int(case.word_T[token]), expert] += 1
            places[block, int(math.log2(token + 1)), expert] += 1
    assert torch.equal(found["words"], words)
    assert torch.equal(found["positions"], places)
    for kept, null in (("words", "words_null"), ("positions", "positions_null")):
        assert torch.equal(found[kept].sum(1), found[null].sum(1)), "experts of every sequence"
        assert torch.equal(found[kept].sum(2), found[null].sum(2)), "words and positions of every sequence"
        assert not torch.equal(found[kept], found[null]) or case.shape.top_k == E


def test_the_null_forgets_which_word_was_routed_where(make_case):
    case = make_case(tokens=4000, tasks=2, top_k=1, experts=4)
    case.index_TK.copy_(case.word_T[:, None])
    found = measure("word_use", case)
    words, null = found["words"].sum(0).double(), found["words_null"].sum(0).double()
    assert torch.equal(words, torch.diag(words.diagonal()))
    expected = words.sum(1, keepdim=True) * words.sum(0) / words.sum()
    # Pearson's chi-squared with 9 degrees of freedom: 27.9 at 0.1 %.
    assert float(((null - expected).square() / expected).sum()) < 27.9
