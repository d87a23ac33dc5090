"""--heal: a reduced checkpoint comes closer to its original, from a folder on disk to a folder on disk."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import stock_logits
from safetensors.torch import load_file, save_file

from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import DataError, UserError
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions, load_tokens
from moetools.training.data import split_sequences
from moetools.training.options import PARTS
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.distill.verb import distill
from moetools.verbs.reduce.healed import healing_text
from moetools.verbs.reduce.options import PruneOptions
from moetools.verbs.reduce.report import ReduceReport
from moetools.verbs.train import healing, trained_model
from moetools.verbs.train.plan import TrainingPlan
from tests.verbs.reduce.reducing import CPU, reduce

FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss"]
"""Softmax renormalised; sigmoid with correction bias, groups and shared experts; top-k then softmax with biases."""


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(2, 128, (42, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, ids: torch.Tensor) -> DataOptions:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": ids}, file)
    return DataOptions(data=[f"random={file}"], seq_len=24, batch_size=7)


def run(
    model: Path, out: Path, data: DataOptions | None, *, verb: str = "prune", forward: ForwardOptions = CPU, **more: Any
) -> ReduceReport:
    return reduce(verb, model, out, data, forward, **{"method": "reap", "target": 6} | more)


def mean_kl(teacher: Path, student: Path, ids: torch.Tensor) -> float:
    """Of the predicted tokens; by hand, with stock transformers, in fp64."""
    p, q = (stock_logits(path, ids)[:, :-1].double().log_softmax(-1) for path in (teacher, student))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def changed(before: Path, after: Path) -> set[str]:
    old, new = (load_file(path / "model.safetensors") for path in (before, after))
    assert {name: (one.shape, one.dtype) for name, one in old.items()} == {
        name: (one.shape, one.dtype) for name, one in new.items()
    }
    return {name for name in old if not torch.equal(old[name], new[name])}


def damage(model: Path) -> None:
    """Turn the routers and down projections of a one-file checkpoint into noise."""
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if any(part in name for part in (".gate.weight", "router.weight", "w2.weight", "experts.down_proj")):
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            tensors[name] = (tensor + noise).to(tensor.dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_heals_and_changes_nothing_else(
    family: str, tiny: Callable[..., Path], tmp_path: Path, data: DataOptions, ids: torch.Tensor
) -> None:
    teacher, start = tiny(family), tmp_path / "start"
    run(teacher, start, data, target=8)
    damage(start)
    models = [StreamedModel(open_checkpoint(path), CPU) for path in (teacher, start)]
    text = load_tokens(data, models[0].checkpoint, 128)
    kl = {"start": mean_kl(teacher, start, ids)}
    for part in PARTS:
        out = tmp_path / part
        training = healing.heal_training(models[0], models[1], text, CPU, steps=40, part=part, seed=0)
        report = distill(teacher, out, StudentOptions(student=start), training, data, CPU, Writing())
        assert report is not None
        assert report.training is not None
        assert report.training.part == part
        assert report.training.best_step > 0
        kl[part] = mean_kl(teacher, out, ids)
        names = changed(start, out)
        routers = {name for name in names if ".gate." in name or ".router." in name}
        experts = {name for name in names if ".experts." in name}
        assert routers
        assert not any("correction" in name for name in names)
        assert bool(experts) == (part != "router")
        assert bool(names - routers - experts) == (part == "all")
    assert kl["router"] < 0.95 * kl["start"]
    assert max(kl["experts"], kl["all"]) < kl["router"]


def test_the_curve_is_the_kl_of_the_written_checkpoint_on_held_out_sequences(
    tiny: Callable[..., Path], tmp_path: Path, data: DataOptions, ids: torch.Tensor
) -> None:
    teacher, out = tiny("mixtral"), tmp_path / "out"
    report = run(teacher, out, data, heal=12, heal_train="experts")
    assert report.healing is not None
    curve = dict(report.healing["curve"])
    assert curve[report.healing["best_step"]] == min(curve.values()) < curve[0]
    text = load_tokens(replace(data, shuffle=True), open_checkpoint(teacher), 128)
    sequences = split_sequences(text, seed=0)
    held_out = torch.stack([sequences.ids[number] for number in sequences.held_out])
    # The checkpoint has bf16 tensors: what was measured is what they hold, not the fp32 weights they were rounded from.
    assert curve[report.healing["best_step"]] == pytest.approx(mean_kl(teacher, out, held_out), rel=1e-3)
    run(teacher, tmp_path / "plain", data)
    assert curve[0] == pytest.approx(mean_kl(teacher, tmp_path / "plain", held_out), rel=1e-3)


def test_what_is_written(tiny: Callable[..., Path], tmp_path: Path, data: DataOptions) -> None:
    out = tmp_path / "out"
    report = run(tiny("mixtral"), out, data, heal=10, heal_train="router")
    assert report.verified
    assert report.out == str(out)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]
    stored = json.loads((out / "moetools.json").read_text())
    assert stored["healing"]["curve"] == [list(point) for point in report.healing["curve"]]  # type: ignore[index]
    assert stored["healing"]["steps"] == 10
    assert {"prepare", "write", "verify", "heal", "of it solving", "of it writing"} <= stored["seconds"].keys()
    assert len(stored["layers"]) == len(report.layers) > 0
    assert "experts per layer | 8 | 6" in (out / "README.md").read_text()
    assert [table.title for table in report.tables()][-1].startswith("healing: router, step ")


def test_never_worse_than_the_start(
    tiny: Callable[..., Path], tmp_path: Path, data: DataOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(healing.LEARNING_RATES, "all", 1e3)
    report = run(tiny("mixtral"), tmp_path / "out", data, heal=5)
    assert report.healing is not None
    assert report.healing["best_step"] == 0
    run(tiny("mixtral"), tmp_path / "plain", data)
    assert not changed(tmp_path / "plain", tmp_path / "out")


def test_seeds_reproduce(tiny: Callable[..., Path], tmp_path: Path, data: DataOptions) -> None:
    found = [
        run(tiny("mixtral"), tmp_path / str(place), replace(data, seed=seed), heal=6)
        for place, seed in enumerate((1, 1, 2))
    ]
    curves = [report.healing["curve"] for report in found]  # type: ignore[index]
    assert curves[0] == curves[1] != curves[2]
    assert not changed(tmp_path / "0", tmp_path / "1")


def test_the_text_is_all_there_is_or_what_is_named_for_it(
    tiny: Callable[..., Path], tmp_path: Path, data: DataOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (30, 24), generator=torch.Generator().manual_seed(8))}, other)
    counts = []
    original = trained_model.Training

    def counting(plan: TrainingPlan, *args: Any, **more: Any) -> Any:
        counts.append(len(plan.sequences.ids))
        return original(plan, *args, **more)

    monkeypatch.setattr(trained_model, "Training", counting)
    few, named = replace(data, samples=12), [str(other)]
    run(tiny("mixtral"), tmp_path / "same", few, heal=3)
    run(tiny("mixtral"), tmp_path / "named", few, heal=3, heal_data=named)
    run(tiny("mixtral"), tmp_path / "alone", replace(few, data=[]), method="random", heal=3, heal_data=named)
    assert counts == [42, 30, 30]
    assert healing_text(PruneOptions(heal=5), few, 0).samples == 5 * 4 + 32


def test_healing_in_bfloat16(tiny: Callable[..., Path], tmp_path: Path, data: DataOptions) -> None:
    found = run(tiny("mixtral"), tmp_path / "out", data, heal=10, forward=replace(CPU, dtype="bfloat16")).healing
    assert found is not None
    curve = dict(found["curve"])
    assert curve[found["best_step"]] == min(curve.values()) < curve[0]


def test_a_model_merged_to_one_expert_heals(
    tiny: Callable[..., Path], tmp_path: Path, data: DataOptions, ids: torch.Tensor
) -> None:
    teacher = tiny("mixtral")
    run(teacher, tmp_path / "plain", data, verb="merge", method="average", target=1)
    run(teacher, tmp_path / "out", data, verb="merge", method="average", target=1, heal=12)
    assert mean_kl(teacher, tmp_path / "out", ids) < mean_kl(teacher, tmp_path / "plain", ids)


def test_a_dry_run_writes_nothing_and_names_the_output(
    tiny: Callable[..., Path], tmp_path: Path, data: DataOptions
) -> None:
    report = run(tiny("mixtral"), tmp_path / "out", data, heal=4, dry_run=True)
    assert report.out == str(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_refused_before_any_weight_is_read(
    tiny: Callable[..., Path], tmp_path: Path, data: DataOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetools.forward.stock.StockModel.read_layer", lambda *_: pytest.fail("a weight was read"))
    model, out = tiny("mixtral"), tmp_path / "out"
    file = Path(data.data[0].partition("=")[2])
    with pytest.raises(UserError, match="`heal` trains on text"):
        run(model, out, None, method="random", heal=4)
    with pytest.raises(UserError, match="`heal_train=attention` is unknown; legal: router, experts, all"):
        run(model, out, data, heal=4, heal_train="attention")
    with pytest.raises(UserError, match="`heal=-1` is below 1"):
        run(model, out, data, heal=-1)
    with pytest.raises(UserError, match="`heal_data` without `heal`"):
        run(model, out, data, heal_data=data.data)
    with pytest.raises(DataError, match="missing"):
        run(model, out, data, heal=4, heal_data=[str(file.with_name("missing.txt"))])
    one = tmp_path / "one.safetensors"
    save_file({"input_ids": torch.ones(1, 24, dtype=torch.int64)}, one)
    with pytest.raises(DataError, match="at least 2 sequences of 2 tokens, 1 given"):
        run(model, out, data, heal=4, heal_data=[str(one)])
    small = replace(CPU, memory_budget=800_000)
    with pytest.raises(UserError, match=r"training needs .* of 800.00 kB: teacher .*, student .*") as found:
        run(model, out, data, heal=4, forward=small)
    assert "`memory_budget`" in found.value.hint
    assert not out.exists()


def test_fewer_sequences_at_a_time_where_memory_is_short(tiny: Callable[..., Path], data: DataOptions) -> None:
    source = open_checkpoint(tiny("mixtral"))
    model = StreamedModel(source, CPU)
    text = load_tokens(data, source, 128)

    def plan(budget: int) -> tuple[int, int]:
        forward = replace(CPU, memory_budget=budget)
        found = healing.heal_training(model, model, text, forward, steps=3, part="all", seed=0)
        return found.train_batch_size, found.accumulate

    assert plan(10**9) == (4, 1)
    loop = healing.heal_training(model, model, text, CPU, steps=3, part="all", seed=0)
    sizes = TrainingPlan(model, model, text, CPU, loop).memory()
    needed, row = sum(sizes.values()), sizes["activations"] // 4
    assert plan(needed - 1) == (2, 2)
    assert plan(needed - 3 * row) == (1, 4)
    with pytest.raises(UserError, match="training needs"):
        plan(needed - 3 * row - 1)
