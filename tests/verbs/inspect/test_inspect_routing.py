"""inspect-routing against stock transformers with hooks, hand-made counts, and the reference model's known facts."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_tiny
from safetensors.torch import save_file
from scipy.stats import chi2
from torch import Tensor

from moetools.errors import MoetoolsError, StatisticsError, UserError
from moetools.forward.calibrate import ModelStatistics, Provenance, load_statistic, load_statistics
from moetools.forward.options import ForwardOptions
from moetools.statistics.base import LayerShape
from moetools.text.options import DataOptions
from moetools.verbs.inspect.information import mutual_information
from moetools.verbs.inspect.layer_routing import null_information, specialization
from moetools.verbs.inspect.options import RoutingOptions
from moetools.verbs.inspect.routing import MORE, NEEDS
from moetools.verbs.inspect.routing import inspect_routing as run
from moetools.verbs.inspect.routing_report import RoutingReport, routing_report
from moetools.verbs.inspect.serving import capacity

CPU = ForwardOptions(device="cpu", dtype="float32")
SHARED = Path(__file__).parents[4] / "shared"
TASKS = ("first", "second")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Two tasks of different size that use different halves of the vocabulary, as files of token ids."""
    folder = tmp_path_factory.mktemp("ids")
    generator = torch.Generator().manual_seed(5)
    made = {}
    for task, (rows, low, high) in zip(TASKS, [(12, 2, 60), (7, 60, 128)], strict=True):
        tokens = torch.randint(low, high, (rows, 16), generator=generator)
        save_file({"input_ids": tokens}, folder / f"{task}.safetensors")
        made[task] = (folder / f"{task}.safetensors", tokens)
    return made


def options(ids: dict[str, tuple[Path, Tensor]], *tasks: str) -> DataOptions:
    return DataOptions(data=[f"{task}={ids[task][0]}" for task in tasks or TASKS], seq_len=16, batch_size=32)


def inspect_routing(model: Path, text: DataOptions | None, **asked: Any) -> RoutingReport:
    return run(model, RoutingOptions(**asked), text or DataOptions(), CPU)


def stock_routing(model: Any, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """(logits [T, E], chosen experts [T, K]) of every MoE layer, seen at the door of stock transformers' experts."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            gate = model.get_submodule(f"{name.removesuffix('.experts')}.gate")
            layer = int(name.split("layers.")[1].split(".")[0])

            def note(_: Any, args: tuple, *, layer: int = layer, gate: Any = gate) -> None:
                hidden_TD, index_TK = args[0].reshape(-1, args[0].shape[-1]), args[1]
                seen[layer] = (hidden_TD @ gate.weight.T, index_TK)

            handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def check_routing(found: dict[str, Any], logits_TE: Tensor, chosen_TK: Tensor, *, sigmoid: bool) -> None:
    """Token by token and expert by expert, with formulas written out."""
    experts = logits_TE.shape[1]
    slots = [sum(expert in row for row in chosen_TK.tolist()) for expert in range(experts)]
    share = [count / sum(slots) for count in slots]
    scores_TE = logits_TE.double().sigmoid() if sigmoid else logits_TE.double().exp()
    P_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    P = P_TE.mean(0).tolist()
    entropy = -sum(f * math.log(f) for f in share if f)
    assert found["tokens"] == len(logits_TE)
    assert found["slots"] == slots
    assert found["share"] == pytest.approx(share)
    assert found["entropy"] == pytest.approx(entropy)
    assert found["entropy_share"] == pytest.approx(entropy / math.log(experts))
    assert found["skew"] == pytest.approx(max(share) / (sum(share) / experts))
    assert found["probability"] == pytest.approx(P, rel=1e-4)
    balance = experts * sum(f * p for f, p in zip(share, P, strict=True))
    assert found["balance_loss"] == pytest.approx(balance, rel=1e-4)
    assert found["z_loss"] == pytest.approx(float(logits_TE.double().exp().sum(1).log().pow(2).mean()), rel=1e-4)
    assert found["router_entropy"] == pytest.approx(float(-(P_TE * P_TE.log()).sum(1).mean()), rel=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "minimax_m2"])
def test_routing_is_what_stock_transformers_did(
    family: str, tiny: Callable[..., Path], stock: Callable[..., Any], ids: dict
) -> None:
    path = tiny(family)
    report = inspect_routing(path, options(ids)).to_json()
    assert report["scoring"] == ("softmax" if family == "mixtral" else "sigmoid")
    seen = {task: stock_routing(stock(path), ids[task][1]) for task in TASKS}
    assert [layer["index"] for layer in report["layers"]] == sorted(seen["first"])
    for layer in report["layers"]:
        each = [seen[task][layer["index"]] for task in TASKS]
        for task, (logits, chosen) in zip(TASKS, each, strict=True):
            check_routing(layer["tasks"][task], logits, chosen, sigmoid=family != "mixtral")
        logits, chosen = (torch.cat(parts) for parts in zip(*each, strict=True))
        check_routing(layer["pooled"], logits, chosen, sigmoid=family != "mixtral")
        check_specialization(layer)
        check_pairs(layer["pairs"], chosen.tolist())


def check_specialization(layer: dict[str, Any]) -> None:
    counts = [layer["tasks"][task]["slots"] for task in TASKS]
    total, columns = sum(map(sum, counts)), [sum(column) for column in zip(*counts, strict=True)]
    information = sum(
        n / total * math.log(n * total / (sum(row) * column))
        for row in counts
        for n, column in zip(row, columns, strict=True)
        if n
    )
    assert layer["specialization"]["mutual_information"] == pytest.approx(information)
    p, q = ([n / sum(row) for n in row] for row in counts)
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    js = sum(sum(a * math.log(a / m) for a, m in zip(side, middle, strict=True) if a) / 2 for side in (p, q))
    assert layer["specialization"]["js_divergence"] == [[0, pytest.approx(js)], [pytest.approx(js), 0]]


def check_pairs(found: list[dict[str, Any]], chosen: list[list[int]]) -> None:
    together = {(i, j): sum(i in row and j in row for row in chosen) for i in range(8) for j in range(i + 1, 8)}
    alone = [sum(i in row for row in chosen) for i in range(8)]
    most = sorted((count for count in together.values() if count), reverse=True)[:20]
    assert [pair["tokens"] for pair in found] == most
    for pair in found:
        i, j = pair["experts"]
        count = together[i, j]
        assert pair["tokens"] == count
        assert pair["share"] == pytest.approx(count / len(chosen))
        assert pair["second_given_first"] == pytest.approx(count / alone[i])
        assert pair["first_given_second"] == pytest.approx(count / alone[j])
        assert pair["lift"] == pytest.approx(count * len(chosen) / (alone[i] * alone[j]))


@pytest.mark.parametrize(
    ("slots", "information"),
    [
        ([[10, 0], [0, 10]], math.log(2)),
        ([[30, 10], [60, 20]], 0),
        ([[2, 0, 0], [0, 1, 0], [0, 0, 1]], 1.5 * math.log(2)),
    ],
)
def test_mutual_information_of_known_tables(slots: list[list[int]], information: float) -> None:
    assert float(mutual_information(torch.tensor(slots))) == pytest.approx(information, abs=1e-12)


def test_the_null_is_every_way_to_deal_out_whole_sequences() -> None:
    """Against all 6 ways to give 2 of 4 sequences to the first task, 3 different ones of equal probability."""
    slots_SE, task_S = torch.tensor([[9, 1], [8, 2], [1, 9], [3, 7]]), torch.tensor([0, 0, 1, 1])
    ways = []
    for first in itertools.combinations(range(4), 2):
        mine = torch.zeros(4, dtype=torch.bool)
        mine[list(first)] = True
        ways.append(float(mutual_information(torch.stack([slots_SE[mine].sum(0), slots_SE[~mine].sum(0)]))))
    null = null_information(slots_SE, task_S, seed=3, draws=3000)
    for value in set(ways):
        share = float((null - value).abs().lt(1e-12).float().mean())
        assert share == pytest.approx(sum(abs(one - value) < 1e-12 for one in ways) / 6, abs=0.03)
    assert torch.equal(null_information(slots_SE, task_S, seed=3), null_information(slots_SE, task_S, seed=3))


def test_sequences_that_vary_are_no_difference_between_tasks() -> None:
    """Sequences with shares of their own: slots taken as independent would call the tasks different (chi-squared)."""
    generator = torch.Generator().manual_seed(6)
    share_SE = torch.softmax(2 * torch.randn(40, 8, generator=generator), 1)
    slots_SE = torch.stack(
        [torch.bincount(one.multinomial(400, True, generator=generator), minlength=8) for one in share_SE]
    )
    task_S = torch.arange(40) % 2
    slots_GE = torch.stack([slots_SE[task_S == task].sum(0) for task in (0, 1)])
    special = specialization(slots_GE, {"slots": slots_SE, "task": task_S}, seed=0)
    assert 2 * int(slots_SE.sum()) * special.mutual_information > 10 * chi2.ppf(0.95, 7)
    assert special.p_value > 0.05
    real_SE = slots_SE + 300 * torch.nn.functional.one_hot(7 * task_S, 8)
    real_GE = torch.stack([real_SE[task_S == task].sum(0) for task in (0, 1)])
    assert specialization(real_GE, {"slots": real_SE, "task": task_S}, seed=0).p_value == 1 / 201


def made_up(slots: list[list[int]]) -> RoutingReport:
    """A report of top-1 routing with these slots per task and expert, in one layer."""
    slots_GE = torch.tensor(slots)
    tasks, experts = slots_GE.shape
    zeros = torch.zeros(tasks, experts, dtype=torch.float64)
    router = {"probability": zeros, "entropy": zeros[:, 0], "z_squared": zeros[:, 0], "gate_mass": zeros}
    router |= {"tokens": slots_GE.sum(1), "sigmoid": torch.tensor(0)}
    pairs = torch.zeros(experts, experts, dtype=torch.int64)
    together = {"pairs": pairs, "chosen": slots_GE.sum(0), "tokens": slots_GE.sum()}
    load = {"slots": slots_GE, "tokens": slots_GE.sum(1)}
    sequences = {"slots": slots_GE, "task": torch.arange(tasks)}
    shape = LayerShape(num_experts=experts, top_k=1, hidden_size=4, expert_size=4, num_tasks=tasks)
    empty = {name: load_statistic(name).init(shape, torch.device("cpu")) for name in ("expert_choice", "margin")}
    statistics = ModelStatistics(
        provenance=Provenance(
            model="m", data="d", tasks=tuple("abc"[:tasks]), dtype="float32", num_tokens=int(slots_GE.sum())
        ),
        shape=shape,
        layers={2: {"load": load, "router": router, "coactivation": together, "sequence_load": sequences, **empty}},
    )
    return routing_report(statistics, "made up")


def test_under_used_is_strictly_below_a_quarter_of_uniform() -> None:
    # 400 slots, 4 experts: uniform is 100, a quarter of it is 25.
    layer = made_up([[24, 25, 0, 351]]).layers[0]
    assert layer.pooled.starved == [0, 2]


def test_nobody_is_called_under_used_on_too_few_tokens() -> None:
    report = made_up([[24, 25, 0, 350], [0, 1, 200, 200]])
    layer = report.layers[0]
    assert layer.tasks["a"].starved is None, "399 slots for 4 experts"
    assert layer.tasks["b"].starved == [0, 1]
    assert report.tables()[2].rows[0][-1] == "not enough tokens"
    assert report.tables()[2].rows[1][-1] == "2 of 4"
    assert made_up([[24, 25, 0, 350]]).tables()[1].rows[0][-1] == "not enough tokens"


def test_a_single_task_has_no_specialization(tiny: Callable[..., Path], ids: dict) -> None:
    report = inspect_routing(tiny("mixtral"), options(ids, "first"))
    assert all(layer.specialization is None for layer in report.layers)
    assert all("specialization" not in layer for layer in report.to_json()["layers"])
    overview = report.tables()[1]
    assert not any("I(task" in column or "JS" in column for column in overview.columns)
    assert [table.title for table in report.tables()[2:]] == [
        "most used experts",
        "experts chosen together",
        "experts that follow each other",
        "token ids and positions",
        "other ways to route",
    ]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_one_expert_and_top_1_work(family: str, tmp_path: Path, ids: dict) -> None:
    key = "num_local_experts" if family == "mixtral" else "num_experts"
    path = make_tiny(family, tmp_path / "one", **{key: 1, "num_experts_per_tok": 1})
    report = inspect_routing(path, options(ids))
    pooled = report.layers[0].pooled
    assert (pooled.entropy_share, pooled.skew, pooled.share) == (1.0, 1.0, [1.0])
    assert pooled.balance_loss == pytest.approx(1)
    assert report.layers[0].pairs == []
    assert report.layers[0].specialization is not None
    assert report.layers[0].specialization.mutual_information == 0
    assert "experts chosen together" not in [table.title for table in report.tables()]


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_capacity_drops_what_does_not_fit(sequences: int) -> None:
    slots_SE = torch.randint(0, 9, (7, 6), generator=torch.Generator().manual_seed(sequences))
    found = capacity(slots_SE, sequences)
    for factor, dropped in zip(found.factors, found.dropped, strict=True):
        lost = 0
        for start in range(0, 7, sequences):
            batch = slots_SE[start : start + sequences].sum(0).tolist()
            lost += sum(max(0, count - math.ceil(sum(batch) * factor / 6)) for count in batch)
        assert dropped == lost / int(slots_SE.sum())
    assert found.dropped == sorted(found.dropped, reverse=True)
    assert 0 < found.enough <= 6


def test_an_even_load_needs_no_more_than_its_share() -> None:
    found = capacity(torch.full((4, 8), 20), 1)
    assert found.enough == 1
    assert found.dropped[found.factors.index(1)] == 0
    assert found.dropped[found.factors.index(0.5)] == 0.5


def test_serving_of_a_real_layer(ids: dict, tiny: Callable[..., Path]) -> None:
    report = inspect_routing(tiny("mixtral"), options(ids))
    for layer in report.layers:
        found = layer.serving
        assert [one.sequences for one in found.capacity] == [1, 8]
        assert 0 < found.kept <= 1
        assert 0 <= found.orphans < 1
        assert list(found.choices.below) == sorted(found.choices.below)
        assert found.choices.negative == 0
        assert 1 < layer.pooled.effective <= 8
    json.dumps(report.to_json(), allow_nan=False)


def test_saved_statistics_give_the_same_report(tiny: Callable[..., Path], ids: dict, tmp_path: Path) -> None:
    path, file = tiny("mixtral"), tmp_path / "stats.safetensors"
    measured = inspect_routing(path, options(ids), save_stats=file)
    assert load_statistics(file).names == tuple(sorted((*NEEDS, *MORE)))
    for data in (None, options(ids), DataOptions(data=[])):
        assert inspect_routing(path, data, stats=file).to_json() == measured.to_json()
    assert json.loads(json.dumps(measured.to_json()))["provenance"]["tasks"] == list(TASKS)
    for table in measured.tables():
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_stale_statistics_are_refused(tiny: Callable[..., Path], ids: dict, tmp_path: Path) -> None:
    path, file = tiny("mixtral"), tmp_path / "stats.safetensors"
    inspect_routing(path, options(ids), save_stats=file)
    with pytest.raises(StatisticsError, match="measured on another model"):
        inspect_routing(tiny("mixtral", seed=1), None, stats=file)
    with pytest.raises(StatisticsError, match="measured on other tokens"):
        inspect_routing(path, options(ids, "first"), stats=file)
    whole = load_statistics(file)
    layers = {index: {"load": states["load"]} for index, states in whole.layers.items()}
    replace(whole, layers=layers).save(file)
    with pytest.raises(StatisticsError, match="lack coactivation, expert_choice, margin, router, sequence_load"):
        inspect_routing(path, None, stats=file)


def test_options_are_checked_before_any_work(ids: dict, tmp_path: Path) -> None:
    """The model does not exist: whoever looks at it first raises another error."""
    missing = tmp_path / "no model"
    (tmp_path / "folder").mkdir()
    wrong: list[tuple[DataOptions | None, dict[str, Path], str]] = [
        (None, {}, "neither `data` nor `stats`"),
        (DataOptions(data=[]), {}, "neither `data` nor `stats`"),
        (options(ids), {"save_stats": tmp_path / "no" / "file"}, "does not exist"),
        (options(ids), {"save_stats": tmp_path / "folder"}, "is a directory"),
        (None, {"stats": tmp_path / "s", "save_stats": tmp_path / "t"}, "saved already"),
    ]
    for data, files, message in wrong:
        with pytest.raises(UserError, match=message):
            inspect_routing(missing, data, **files)
    with pytest.raises(MoetoolsError, match="no model"):
        inspect_routing(missing, options(ids))


@pytest.mark.skipif(not (SHARED / "models" / "mixtral-8x9m").is_dir(), reason="the shared model is not here")
def test_the_reference_model_is_as_specialised_as_its_readme_says() -> None:
    names = ("code", "math", "plays", "reviews", "german")
    files = [f"{task}={SHARED}/data/{task}/val.jsonl" for task in names]
    report = inspect_routing(SHARED / "models" / "mixtral-8x9m", DataOptions(data=files, seq_len=256, samples=24))
    last = report.layers[-1]
    share = {task: routing.share for task, routing in last.tasks.items()}
    assert share["math"][5] == pytest.approx(0.32, abs=0.03)
    assert share["german"][4] == pytest.approx(0.30, abs=0.03)
    assert share["plays"][2] == pytest.approx(0.29, abs=0.03)
    assert all(0.40 < task[6] < 0.50 for task in share.values())
    assert all(share[task][5] < 0.07 for task in names if task != "math")
    assert last.pooled.share[7] < 0.03
    assert last.pooled.starved == [7]
    for layer in report.layers:
        assert layer.specialization is not None
        assert layer.specialization.mutual_information > layer.specialization.null_p95
        assert layer.specialization.p_value == 1 / 201
        assert 0 < layer.specialization.null_mean < layer.specialization.null_p95
