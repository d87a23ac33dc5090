"""What inspect-routing says beyond load, against stock transformers with hooks, token by token."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moetools.checkpoint.reader import open_checkpoint
from moetools.forward.calibrate import (
    ModelStatistics,
    collect_statistics,
    frequent_ids,
    load_statistic,
    load_statistics,
)
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.statistics.base import LayerShape
from moetools.text.tokens import TokenBatch, TokenData
from moetools.verbs.inspect.routing import MORE, NEEDS
from moetools.verbs.inspect.routing_report import routing_report
from moetools.verbs.inspect.shared import shared_work
from moetools.verbs.inspect.word_use import dependence, word_report

FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "minimax_m2", "gpt_oss"]
"""Softmax; softmax with a shared expert; sigmoid with bias in groups; sigmoid with bias; softmax over the chosen."""


def batches_of_two_tasks() -> list[TokenBatch]:
    """With and without padding."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for task, real in [(0, (20, 20, 20)), (0, (20, 13)), (1, (8, 7, 6, 3)), (1, (33,))]:
        ids = torch.randint(2, 128, (len(real), max(real)), generator=generator)
        mask = torch.arange(max(real)) < torch.tensor(real)[:, None]
        padded = None if bool(mask.all()) else mask
        tasks = torch.full((len(real),), task)
        made.append(TokenBatch(input_ids=torch.where(mask, ids, 1), attention_mask=padded, task=tasks))
    return made


def seen_by_stock(model: Any, batches: list[Any]) -> dict[int, Tensor]:
    """Layer -> the experts [T, K] chosen for every real token of all batches."""
    seen: dict[int, list[Tensor]] = {}
    masks = [
        torch.ones(batch.input_ids.numel()).bool() if batch.attention_mask is None else batch.attention_mask.flatten()
        for batch in batches
    ]
    for batch, real in zip(batches, masks, strict=True):
        handles = []
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                kept = seen.setdefault(int(name.split("layers.")[1].split(".")[0]), [])

                def note(_: Any, args: tuple, kwargs: dict, *, kept: list = kept, real: Tensor = real) -> None:
                    kept.append([*args, *kwargs.values()][1][real])

                handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        mask = None if batch.attention_mask is None else batch.attention_mask.long()
        with torch.inference_mode():
            model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts) for layer, parts in sorted(seen.items())}


def measured(path: Path) -> ModelStatistics:
    model = StreamedModel(open_checkpoint(path), ForwardOptions(device="cpu"))
    batches = tuple(batches_of_two_tasks())
    data = TokenData(tasks=("first", "second"), batches=batches, fingerprint="these", seq_len=64)
    return collect_statistics(model, data, (*NEEDS, *MORE))


@pytest.mark.parametrize("family", FAMILIES)
def test_followers_are_those_of_stock(family: str, tiny: Callable[..., Path], stock: Callable[..., Any]) -> None:
    chosen = seen_by_stock(stock(tiny(family)), batches_of_two_tasks())
    report = routing_report(measured(tiny(family)), family)
    before: int | None = None
    for layer in report.layers:
        if before is None:
            assert layer.following is None
            before = layer.index
            continue
        found, tokens = layer.following, len(chosen[before])
        assert found is not None
        assert found.layer_before == before
        pairs = {(i, j): 0 for i in range(8) for j in range(8)}
        for one, two in zip(chosen[before].tolist(), chosen[layer.index].tolist(), strict=True):
            for i in one:
                for j in two:
                    pairs[i, j] += 1
        old = [sum(i in row for row in chosen[before].tolist()) for i in range(8)]
        new = [sum(j in row for row in chosen[layer.index].tolist()) for j in range(8)]
        excess = {(i, j): count - old[i] * new[j] / tokens for (i, j), count in pairs.items()}
        most = sorted(excess.values(), reverse=True)[: len(found.followers)]
        assert [excess[one.before, one.expert] for one in found.followers] == pytest.approx(most)
        for one in found.followers:
            count = pairs[one.before, one.expert]
            assert one.tokens == count
            assert one.share == pytest.approx(count / tokens)
            assert one.given_before == pytest.approx(count / old[one.before])
            assert one.lift == pytest.approx(count * tokens / (old[one.before] * new[one.expert]))
        before = layer.index


def test_older_files_give_the_report_without_what_they_lack(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A file as it was written before: neither the new statistics nor their metadata."""
    measured(tiny("mixtral")).save(tmp_path / "new")
    with safe_open(tmp_path / "new", "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys() if name.split(".")[1] in NEEDS}  # noqa: SIM118
        metadata = opened.metadata()
    shape = json.loads(metadata["shape"])
    del metadata["token_ids"], shape["num_words"]
    save_file(tensors, tmp_path / "old", metadata=metadata | {"shape": json.dumps(shape)})
    report = routing_report(load_statistics(tmp_path / "old"), "old")
    titles = {table.title for table in report.tables()}
    assert not titles & {"experts that follow each other", "work common to all tokens", "token ids and positions"}
    assert "advice" in titles
    assert all({"following", "words"}.isdisjoint(layer) for layer in report.to_json()["layers"])


def shared_parts_of_stock(model: Any, batches: list[Any]) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer -> (shared experts' output, whole block's) [T, D] of the real tokens, from hooks on stock's own modules."""
    seen: dict[int, dict[str, list[Tensor]]] = {}
    handles = []
    for name, module in model.named_modules():
        found = re.fullmatch(r".*layers\.(\d+)\.(\w+)\.(shared_experts?)", name)
        if not found:
            continue
        kept = seen.setdefault(int(found[1]), {"shared": [], "whole": [], "gate": []})
        block = model.get_submodule(name.rpartition(".")[0])
        watched = {"shared": module, "whole": block, "gate": getattr(block, "shared_expert_gate", None)}
        for part, one in watched.items():
            if one is not None:
                keep = lambda _m, _a, out, kept=kept, part=part: kept[part].append(out.flatten(0, -2))  # noqa: E731
                handles.append(one.register_forward_hook(keep))
    for batch in batches:
        mask = None if batch.attention_mask is None else batch.attention_mask.long()
        with torch.inference_mode():
            model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    masks = [torch.ones_like(one.input_ids) if one.attention_mask is None else one.attention_mask for one in batches]
    real = torch.cat([mask.flatten() for mask in masks]).bool()
    parts = {}
    for layer, kept in seen.items():
        shared = torch.cat(kept["shared"]) * (torch.cat(kept["gate"]).sigmoid() if kept["gate"] else 1)
        parts[layer] = (shared[real].double(), torch.cat(kept["whole"])[real].double())
    return parts


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe"])
def test_shared_experts_carry_what_they_carry_in_stock(
    family: str, tiny: Callable[..., Path], stock: Callable[..., Any]
) -> None:
    parts = shared_parts_of_stock(stock(tiny(family)), batches_of_two_tasks())
    report = routing_report(measured(tiny(family)), family)
    assert sorted(parts) == [layer.index for layer in report.layers]
    for layer in report.layers:
        shared, whole = parts[layer.index]
        assert layer.shared.norm_share == pytest.approx(float(shared.norm(dim=1).sum() / whole.norm(dim=1).sum()), 1e-4)
        assert layer.shared.carried == pytest.approx(float((shared * whole).sum() / whole.square().sum()), 1e-3)


def test_routed_experts_that_nearly_all_tokens_choose() -> None:
    def found(slots: list[list[int]], tokens: list[int]) -> list[tuple[int, float, float]]:
        load = {"slots": torch.tensor(slots), "tokens": torch.tensor(tokens)}
        return [(one.expert, one.tokens, one.least) for one in shared_work({"load": load}).like_shared]

    many, few = [160, 40, 100, 100], [5, 45, 30, 20]
    assert found([many, [200, 0, 100, 100]], [200, 200]) == [(0, 0.9, 0.8)]
    assert found([many, few], [200, 50]) == [(0, 165 / 250, 0.8)], "50 tokens have no say"
    assert found([many, [159, 41, 100, 100]], [200, 200]) == []
    assert found([[200, 200, 200, 0]], [200]) == [], "three of four: everybody is chosen by nearly all"
    assert found([few], [50]) == []


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_effective_experts_of_every_task(family: str, tiny: Callable[..., Path], stock: Callable[..., Any]) -> None:
    report = routing_report(measured(tiny(family)), family)
    each = [[one for one in batches_of_two_tasks() if int(one.task[0]) == task] for task in (0, 1)]
    for task, batches in zip(("first", "second"), each, strict=True):
        expected = {}
        for layer, chosen_TK in seen_by_stock(stock(tiny(family)), batches).items():
            share = [float((chosen_TK == expert).double().mean()) for expert in range(8)]
            expected[layer] = math.exp(-sum(one * math.log(one) for one in share if one))
        found = report.to_json()["effective_experts"][task]
        assert found["by_layer"] == pytest.approx(expected)
        ordered = sorted(expected.values())
        assert found["median"] == pytest.approx((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2)
    table = next(table for table in report.tables() if table.title == "effective experts")
    assert table.columns == ["layer", "first", "second", "all"]
    assert table.rows[-1][1] == f"{report.effective_experts()['first'].median:.1f}"


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_counted_as_stock_routed_them(
    family: str, tiny: Callable[..., Path], stock: Callable[..., Any]
) -> None:
    batches = batches_of_two_tasks()
    chosen = seen_by_stock(stock(tiny(family)), batches)
    rows = [
        (number, ids[: len(ids) if batch.attention_mask is None else int(batch.attention_mask[place].sum())].tolist())
        for number, (batch, place) in enumerate((one, row) for one in batches for row in range(len(one.input_ids)))
        for ids in [batch.input_ids[place]]
    ]
    counts = Counter(word for _, ids in rows for word in ids)
    statistics = measured(tiny(family))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    assert list(statistics.token_ids) == ranked, "less than 512 ids"
    for layer, states in statistics.layers.items():
        words, places = torch.zeros(8, len(ranked) + 1, 8).long(), torch.zeros(8, 16, 8).long()
        routed = iter(chosen[layer].tolist())
        for number, ids in rows:
            for place, (word, experts) in enumerate(zip(ids, routed, strict=False)):
                words[number % 8, ranked.index(word), experts] += 1
                places[number % 8, int(math.log2(place + 1)), experts] += 1
        assert next(routed, None) is None
        assert torch.equal(states["word_use"]["words"], words)
        assert torch.equal(states["word_use"]["positions"], places)


def test_only_the_most_frequent_ids_are_told_apart() -> None:
    ids = torch.cat([torch.arange(900), torch.arange(5, 700), torch.tensor([899])])
    batch = TokenBatch(input_ids=ids[None], attention_mask=None, task=torch.zeros(1).long())
    data = TokenData(tasks=("all",), batches=(batch,), fingerprint="these", seq_len=2000)
    assert frequent_ids(data, 128) == tuple(range(5, 261))
    assert frequent_ids(data, 8) == tuple(range(5, 517))
    assert len(frequent_ids(data, 2**14)) == 16
    assert 8 * load_statistic("word_use").init(layer_of_128(), torch.device("meta"))["words"].numel() < 2.2e6


def layer_of_128() -> LayerShape:
    sizes = {"num_experts": 128, "top_k": 8, "hidden_size": 2048, "expert_size": 768}
    return LayerShape(**sizes, num_tasks=5, num_words=257)


def test_dependence_on_words_and_who_owns_them() -> None:
    """Experts 0 and 1 own one id each, the third id goes anywhere; the null has independent counts."""
    generator = torch.Generator().manual_seed(2)
    words, null = torch.zeros(8, 4, 4).long(), torch.zeros(8, 4, 4).long()
    for block in range(8):
        noise = torch.multinomial(torch.ones(4), 400, replacement=True, generator=generator).bincount(minlength=4)
        words[block] = torch.stack([torch.tensor([90, 2, 4, 4]), torch.tensor([1, 80, 9, 10]), noise, 0 * noise])
        for word in range(3):
            total, share = int(words[block, word].sum()), words[block].sum(0).double()
            drawn = torch.multinomial(share, total, replacement=True, generator=generator)
            null[block, word] = drawn.bincount(minlength=4)
    state = {"words": words, "words_null": null, "positions": null, "positions_null": null}
    found = word_report(state, (70, 71, 72), top_k=1, seed=0, decode=lambda one: f"<{one}>")
    assert found is not None
    table = words.sum(0).tolist()
    total = sum(map(sum, table))
    information = sum(
        n / total * math.log(n * total / (sum(row) * sum(line[e] for line in table)))
        for row in table
        for e, n in enumerate(row)
        if n
    )
    assert found.words.information == pytest.approx(information)
    assert found.words.low < found.words.excess < found.words.high
    assert found.words.low > 0.1
    assert found.positions.low <= 0 <= found.positions.high
    assert found.covered == 1
    assert {expert: [one.text for one in owned] for expert, owned in found.owned.items()} == {0: ["<70>"], 1: ["<71>"]}
    (word,) = found.owned[0]
    assert (word.token_id, word.tokens, word.share) == (70, 800, 0.9)
    assert word.lift == pytest.approx(0.9 * total / sum(row[0] for row in table))
    assert word_report({key: 0 * one for key, one in state.items()}, (), top_k=1, seed=0, decode=None) is None


def test_independent_words_have_no_excess() -> None:
    """Observed and null drawn from the same distribution: the interval holds 0, though plug-in information is large."""
    generator = torch.Generator().manual_seed(3)
    cells = torch.rand(40, generator=generator).outer(torch.rand(16, generator=generator)).flatten()
    real, null = (
        torch.stack(
            [torch.multinomial(cells, 500, True, generator=generator).bincount(minlength=640) for _ in range(8)]
        )
        for _ in range(2)
    )
    found = dependence(real.unflatten(1, (40, 16)), null.unflatten(1, (40, 16)), seed=0)
    assert found.information > 0.05
    assert found.low < 0 < found.high
