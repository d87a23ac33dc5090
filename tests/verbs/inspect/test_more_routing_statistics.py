"""What inspect-routing says beyond load, against stock transformers with hooks, token by token."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moetools.checkpoint.reader import open_checkpoint
from moetools.forward.calibrate import ModelStatistics, collect_statistics
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.text.tokens import TokenBatch, TokenData
from moetools.verbs.inspect.routing import MORE, NEEDS
from moetools.verbs.inspect.routing_report import routing_report
from moetools.verbs.inspect.shared import shared_work

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


def test_older_files_give_the_report_without_what_they_lack(tiny: Callable[..., Path]) -> None:
    whole = measured(tiny("mixtral"))
    old = {index: {name: states[name] for name in NEEDS} for index, states in whole.layers.items()}
    report = routing_report(ModelStatistics(provenance=whole.provenance, shape=whole.shape, layers=old), "old")
    assert "experts that follow each other" not in [table.title for table in report.tables()]
    assert all("following" not in layer for layer in report.to_json()["layers"])


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
