"""distill from folders on disk to a verified folder on disk: making, training, healing, caching, resuming."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetools.errors import DataError, MoetoolsError, StatisticsError, UserError
from moetools.forward.options import ForwardOptions
from moetools.passes.student_layers import StudentFitter
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.training.options import TrainOptions
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.distill.report import DistillReport
from moetools.verbs.distill.verb import distill
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate
from tests.verbs.reduce.reducing import CPU, reduce
from tests.verbs.reduce.test_compress import STOCK_CHECK

UNFITTED = StudentOptions(init="random", warm_start=False)
QUICK = TrainOptions(steps=12, train_batch_size=4, learning_rate=3e-4, log_every=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (96, 16), generator=torch.Generator().manual_seed(3))}, file)
    return DataOptions(data=[f"random={file}"], seq_len=16, batch_size=4)


def run(
    teacher: Path,
    out: Path,
    data: DataOptions | None,
    training: TrainOptions | None = QUICK,
    *,
    make: StudentOptions | None = None,
    student: Path | None = None,
    forward: ForwardOptions = CPU,
    writing: Writing | None = None,
    **more: Any,
) -> DistillReport:
    asked = replace(make or StudentOptions(local_steps=3), student=student)
    loop = replace(training or TrainOptions(), **more)
    how = (data or DataOptions(), forward, writing or Writing())
    report = distill(teacher, out, asked, loop, *how, command="moetools distill test")
    assert report is not None
    return report


def kl(reference: Path, model: Path, data: DataOptions) -> float:
    agreement = evaluate([model], EvaluateOptions(reference=reference), data, CPU).models[1].metrics.agreement
    assert agreement is not None
    return agreement.kl


def stock_loads(tmp_path: Path, *paths: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", STOCK_CHECK, "[[5, 6, 7, 8]]", *map(str, paths)]
    check = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert check.stdout.count(" good ") == len(paths), check.stdout + check.stderr


def test_a_trained_dense_student(tiny: Callable[..., Path], tmp_path: Path, data: DataOptions) -> None:
    teacher = tiny("mixtral", dtype=torch.float32)
    run(teacher, tmp_path / "made", data, None, make=UNFITTED)
    longer = replace(QUICK, steps=16, learning_rate=2e-3)
    report = run(teacher, tmp_path / "trained", data, longer, make=UNFITTED, train_baseline="scratch")
    assert kl(teacher, tmp_path / "trained", data) < 0.9 * kl(teacher, tmp_path / "made", data)
    stock_loads(tmp_path, tmp_path / "made", tmp_path / "trained")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "trained"]
    stored = json.loads((tmp_path / "trained" / "moetools.json").read_text())
    assert stored["families"] == ["mixtral", "mistral"]
    assert len(stored["fits"]) == 3
    assert stored["training"]["curve"] == [dict(point) for point in report.training.curve]  # type: ignore[union-attr]
    assert (tmp_path / "trained" / "metrics.jsonl").read_text().count("\n") > 10
    assert "moetools distill test" in (tmp_path / "trained" / "README.md").read_text()
    assert [table.title.split(":")[0] for table in report.tables()] == [
        "distill from random",
        "FFN of every layer before training",
        "training all",
        "against the same student trained without the teacher (scratch)",
    ]


@pytest.mark.parametrize(
    ("part", "family"),
    [
        ("router", "deepseek_v3"),
        ("router", "gpt_oss"),
        ("experts", "mixtral"),
        ("experts", "gpt_oss"),
        ("all", "deepseek_v3"),
        ("all", "mixtral"),
    ],
)
def test_healing_trains_the_named_part_alone(
    family: str, part: str, tiny: Callable[..., Path], tmp_path: Path, data: DataOptions
) -> None:
    teacher = tiny(family, dtype=torch.float32)
    reduce("prune", teacher, tmp_path / "pruned", data, target=6)
    rate = replace(QUICK, learning_rate=3e-3) if part == "router" else QUICK
    run(teacher, tmp_path / "healed", data, rate, student=tmp_path / "pruned", train=part)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "healed"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    routers = {name for name in before if "router" in name or ".gate." in name}
    experts = {name for name in before if ".experts." in name}
    assert changed
    if part == "router":
        assert changed <= routers
    if part == "experts":
        assert changed <= routers | experts
        assert changed & experts
    if part == "all":
        assert changed - routers - experts
    assert kl(teacher, tmp_path / "healed", data) <= kl(teacher, tmp_path / "pruned", data) + 1e-3
    before_config, after_config = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("pruned", "healed"))
    assert before_config == after_config


def test_a_teacher_cache_with_the_whole_vocabulary_is_the_teacher(
    tiny: Callable[..., Path], tmp_path: Path, data: DataOptions, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = tiny("mixtral", dtype=torch.float32)
    with caplog.at_level(logging.INFO, logger="moetools"):
        online = run(teacher, tmp_path / "online", data)
        cached = run(teacher, tmp_path / "cached", data, teacher_cache=tmp_path / "cache", cache_top=127)
    few = run(teacher, tmp_path / "few", data, teacher_cache=tmp_path / "small", cache_top=16)
    assert online.training is not None
    assert cached.training is not None
    assert few.training is not None
    for one, other, less in zip(online.training.curve, cached.training.curve, few.training.curve, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert less["cross_entropy"] == pytest.approx(one["cross_entropy"], abs=0.05)
    assert few.training.curve[0]["divergence"] < online.training.curve[0]["divergence"]  # a coarser view
    assert f"{127 * 4 + 4} bytes per token, {(127 * 4 + 4) * 1536 / 1000:.2f} kB in all" in caplog.text
    files = list((tmp_path / "cache").glob("*.safetensors"))
    payload = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert payload == cached.training.cached == (127 * 4 + 4) * 1536


def test_a_capture_resumes_and_gives_the_same_files(
    tiny: Callable[..., Path],
    tmp_path: Path,
    data: DataOptions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("moetools.training.cache._PART_TOKENS", 400)
    run(tiny("mixtral"), tmp_path / "one", data, teacher_cache=tmp_path / "whole", cache_top=8)
    files = sorted((tmp_path / "whole").glob("*.safetensors"))
    assert len(files) == 4
    meant = {file.name: file.read_bytes() for file in files}
    files[2].unlink()
    (tmp_path / "whole" / "group-00002.safetensors.new").write_bytes(b"half")
    flipped = bytearray(meant[files[1].name])
    flipped[-9] ^= 1
    files[1].write_bytes(flipped)
    stamps = {file.name: file.stat().st_mtime_ns for file in (files[0], files[3])}
    with caplog.at_level(logging.WARNING, logger="moetools"):
        run(tiny("mixtral"), tmp_path / "two", data, teacher_cache=tmp_path / "whole", cache_top=8)
    assert caplog.text.count("captured again") == 1
    assert "group-00001.safetensors is damaged" in caplog.text
    assert {file.name: file.read_bytes() for file in files} == meant
    assert all(file.stat().st_mtime_ns == stamps[file.name] for file in files if file.name in stamps)


def test_stale_caches_are_refused(tiny: Callable[..., Path], tmp_path: Path, data: DataOptions) -> None:
    run(tiny("mixtral"), tmp_path / "one", data, teacher_cache=tmp_path / "cache", cache_top=8)
    other = replace(data, samples=20)
    bad: list[tuple[Path, DataOptions, int, str]] = [
        (tiny("mixtral", seed=7), data, 8, "another teacher"),
        (tiny("mixtral"), other, 8, "another data"),
        (tiny("mixtral"), data, 9, "another top"),
    ]
    for teacher, text, top, message in bad:
        with pytest.raises(StatisticsError, match=message):
            run(teacher, tmp_path / "out", text, teacher_cache=tmp_path / "cache", cache_top=top)
    (tmp_path / "cache" / "cache.json").write_text("{")
    with pytest.raises(StatisticsError, match="cannot be read"):
        run(tiny("mixtral"), tmp_path / "out", data, teacher_cache=tmp_path / "cache", cache_top=8)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="neither a teacher cache"):
        run(tiny("mixtral"), tmp_path / "out", data, teacher_cache=tmp_path / "notes")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_training_resumes_bit_for_bit(
    tiny: Callable[..., Path], tmp_path: Path, data: DataOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, options = tiny("mixtral"), replace(QUICK, save_every=3)
    run(teacher, tmp_path / "whole", data, options)
    from moetools.training import trainer

    steps, original = [0], trainer._Trainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == 8:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Trainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(teacher, tmp_path / "parts", data, options)
    assert not (tmp_path / "parts").exists()
    with monkeypatch.context() as patch:
        patch.setattr(StudentFitter, "fit", lambda *_: pytest.fail("the student was finished"))
        run(teacher, tmp_path / "parts", data, options, writing=Writing(resume=True))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_a_dry_run_writes_nothing_and_says_what_it_needs(
    tiny: Callable[..., Path], tmp_path: Path, data: DataOptions
) -> None:
    made = run(tiny("mixtral"), tmp_path / "out", data, None, writing=Writing(dry_run=True))
    assert made.made is not None
    assert made.made.nbytes[1] < made.made.nbytes[0]
    trained = run(tiny("mixtral"), tmp_path / "out", data, writing=Writing(dry_run=True))
    assert "12 steps" in trained.notes[1]
    assert "gradients and optimizer" in trained.notes[0]
    healed = run(
        tiny("mixtral"),
        tmp_path / "out",
        data,
        student=tiny("mixtral", seed=1),
        writing=Writing(dry_run=True),
        teacher_cache=tmp_path / "cache",
    )
    assert "teacher 0 B" in healed.notes[0]
    assert "260 bytes per token" in healed.notes[1]
    assert not list(tmp_path.iterdir())


def test_a_padded_student_vocabulary_is_handled(
    tiny: Callable[..., Path], rewrite: Callable[..., Path], tmp_path: Path, data: DataOptions
) -> None:
    def padded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat(
                (tensors[name], torch.zeros(32, tensors[name].shape[1], dtype=tensors[name].dtype))
            )
        return tensors

    student = rewrite(tiny("mixtral", seed=1), padded, config={"vocab_size": 160})
    report = run(tiny("mixtral"), tmp_path / "out", data, student=student)
    assert report.training is not None
    assert report.training.curve[-1]["divergence"] < report.training.curve[0]["divergence"]
    head = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert head.shape[0] == 160
    assert not head[128:].any()


def test_bad_input_is_refused_before_anything_is_written(
    tiny: Callable[..., Path], rewrite: Callable[..., Path], tmp_path: Path, data: DataOptions
) -> None:
    mixtral = tiny("mixtral")
    run(mixtral, tmp_path / "dense", data, None)
    small = rewrite(
        mixtral,
        lambda tensors: {name: tensor[:100] if tensor.shape[0] == 128 else tensor for name, tensor in tensors.items()},
        config={"vocab_size": 100},
    )
    existing = {path.name for path in tmp_path.iterdir()}
    bad: list[tuple[dict[str, Any], type[MoetoolsError], str]] = [
        ({"student": small}, UserError, "the student 100"),
        ({"student": tmp_path / "dense", "train": "router"}, UserError, "has no experts"),
        ({"student": tmp_path / "dense", "training": None}, UserError, "for how long"),
        ({"train": "attention"}, UserError, "`train=attention` is unknown"),
        ({"train_baseline": "nothing"}, UserError, "`train_baseline=nothing`"),
        ({"teacher_cache": tmp_path / "c", "divergence": "reverse"}, UserError, "whole distribution"),
        ({"teacher_cache": tmp_path / "c", "hidden_weight": 1.0}, UserError, "hidden states"),
        ({"teacher_cache": tmp_path / "no" / "c"}, UserError, "does not exist"),
        ({"fsdp": True}, UserError, "shards over GPUs"),
        ({"steps": 0}, UserError, "`steps=0`"),
        ({"weight_decay": -1.0}, UserError, "`weight_decay=-1.0` is not 0 or more"),
        ({"save_every": -1}, UserError, "`save_every=-1` is not 0 or more"),
    ]
    for options, kind, message in bad:
        with pytest.raises(kind, match=message):
            run(mixtral, tmp_path / "out", data, **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="needs text"):
        run(mixtral, tmp_path / "out", None)
    with pytest.raises(UserError, match="the student's fit chooses its ridge on every 7th sequence, and 6 sequences"):
        run(mixtral, tmp_path / "out", replace(data, samples=6), None)
    with pytest.raises(UserError, match="dense already"):
        run(tmp_path / "dense", tmp_path / "out", data)
    with pytest.raises(DataError, match="at least 2 sequences"):
        run(mixtral, tmp_path / "out", replace(data, samples=1), student=mixtral)
    small_budget = replace(CPU, memory_budget=400_000)
    with pytest.raises(UserError, match="training needs") as found:
        run(mixtral, tmp_path / "out", data, student=mixtral, forward=small_budget)
    assert "`train_batch_size`" in found.value.hint
    assert {path.name for path in tmp_path.iterdir()} == existing
