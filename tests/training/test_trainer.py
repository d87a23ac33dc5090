"""The training loop: it learns, resumes bit for bit, and two processes do what one does."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from moetools.errors import DataError, UserError, VerificationError
from moetools.forward.progress import Silent
from moetools.text.tokens import TokenBatch, TokenData
from moetools.training import trainer as module
from moetools.training.data import Sequences, collate, split_sequences
from moetools.training.distiller import Distiller, OnlineTeacher
from moetools.training.loss import LossOptions
from moetools.training.models import check_head, common_vocabulary, load_whole
from moetools.training.options import TrainOptions, planned_steps
from moetools.training.schedule import Pace
from moetools.training.trainer import TrainResult, train

CPU = torch.device("cpu")
FORWARD = LossOptions()


def sequences(padded: bool = False) -> Sequences:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(2, 128, (24, 12), generator=generator)
    mask = None
    if padded:
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[::3, 7:] = False
    batch = TokenBatch(input_ids=ids, attention_mask=mask, task=torch.zeros(24, dtype=torch.int64))
    return split_sequences(TokenData(tasks=("t",), batches=(batch,), fingerprint="f", seq_len=12), seed=0)


def distiller(
    tiny: Callable[..., Path], family: str = "mixtral", loss: LossOptions = FORWARD, **more: Any
) -> Distiller:
    teacher = load_whole(tiny(family), dtype=torch.float32, device=CPU, trainable=False)
    student = load_whole(tiny(family, seed=1), dtype=torch.float32, device=CPU, trainable=True)
    return Distiller(student, OnlineTeacher(teacher, 128), loss, vocabulary=128, **more)


def run(
    made: Distiller, folder: Path, options: TrainOptions, *, resume: bool = False, padded: bool = False
) -> TrainResult:
    return train(
        made,
        sequences(padded),
        options,
        folder / "training",
        metrics=folder / "metrics.jsonl",
        resume=resume,
        progress=Silent(),
    )


QUICK = TrainOptions(steps=12, train_batch_size=4, learning_rate=3e-3, log_every=4)


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_what_plain_code_computes(padded: bool, tiny: Callable[..., Path]) -> None:
    made = distiller(tiny, loss=LossOptions(alpha=0.25, temperature=2.0))
    found = sequences(padded)
    batch = collate([{"ids": found.ids[number], "number": number} for number in found.training[:5]])
    out = made(**batch)
    total, count = 0.0, 0
    assert isinstance(made.teacher, OnlineTeacher)
    for number in found.training[:5]:
        ids = found.ids[number][None]
        with torch.no_grad():
            student, teacher = (one(ids, use_cache=False).logits[0, :-1] for one in (made.student, made.teacher.model))
        log_p, log_q = (torch.log_softmax(logits / 2, -1) for logits in (teacher, student))
        kl = (log_p.exp() * (log_p - log_q)).sum()
        entropy = functional.cross_entropy(student, ids[0, 1:], reduction="sum")
        total += (0.25 * entropy + 0.75 * 4 * kl).item()
        count += ids.shape[1] - 1
    assert int(out["tokens"]) == count
    assert out["loss"].item() == pytest.approx(total / count, rel=1e-5)


def test_training_brings_the_student_closer_and_records_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    result = run(distiller(tiny, "qwen2_moe"), tmp_path, replace(QUICK, steps=30, learning_rate=1e-2))
    assert result.curve[-1]["divergence"] < 0.8 * result.curve[0]["divergence"]
    assert result.tokens == 30 * 4 * 11
    assert result.stopped is None
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert {"divergence", "cross_entropy", "learning_rate", "tokens", "seconds"} <= steps[0].keys()
    assert [line["held_out_loss"] for line in lines if "held_out_loss" in line][-1] == result.curve[-1]["loss"]


def test_hidden_states_can_be_matched(tiny: Callable[..., Path], tmp_path: Path) -> None:
    made = distiller(tiny, hidden_weight=1.0)
    result = run(made, tmp_path, replace(QUICK, hidden_weight=1.0, learning_rate=1e-2))
    assert result.curve[-1]["loss"] < result.curve[0]["loss"]
    assert result.curve[0]["loss"] > result.curve[0]["divergence"] + 0.1


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_the_large_batch(accumulate: int, tiny: Callable[..., Path], tmp_path: Path) -> None:
    whole = run(distiller(tiny), tmp_path / "whole", replace(QUICK, steps=3), padded=True)
    small = replace(QUICK, steps=3, train_batch_size=4 // accumulate, accumulate=accumulate)
    parts = run(distiller(tiny), tmp_path / "parts", small, padded=True)
    for one, other in zip(whole.curve, parts.curve, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(tiny: Callable[..., Path], tmp_path: Path) -> None:
    results = [
        run(distiller(tiny), tmp_path / str(on), replace(QUICK, steps=3, gradient_checkpointing=on))
        for on in (False, True)
    ]
    assert results[0].curve[-1]["loss"] == pytest.approx(results[1].curve[-1]["loss"], rel=1e-6)


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(QUICK, save_every=4)
    whole = run(distiller(tiny), tmp_path / "whole", options)
    steps, original = [0], module._Trainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == 7:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module._Trainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(distiller(tiny), tmp_path / "parts", options)
    resumed = run(distiller(tiny), tmp_path / "parts", options, resume=True)
    assert resumed.steps == 12
    assert resumed.best_step == whole.best_step
    assert [point["loss"] for point in resumed.curve] == [point["loss"] for point in whole.curve]
    for name, tensor in whole.state.items():
        assert torch.equal(tensor, resumed.state[name]), name
    records = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert records[0] == records[1]


def test_tied_weights_are_saved_and_resumed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """qwen2_moe's tiny model ties its head to its embeddings."""
    options = replace(QUICK, steps=4, save_every=2)
    run(distiller(tiny, "qwen2_moe"), tmp_path, options)
    again = run(distiller(tiny, "qwen2_moe"), tmp_path, options, resume=True)
    assert again.steps == 4
    assert torch.equal(again.state["lm_head.weight"], again.state["model.embed_tokens.weight"])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = distiller(tiny)
    good = {name: tensor.clone() for name, tensor in made.student.state_dict().items()}
    steps, original = [0], module._Trainer.training_step

    def diverging(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == 3:
            with torch.no_grad():
                made.student.model.norm.weight.fill_(float("nan"))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(module._Trainer, "training_step", diverging)
    result = run(made, tmp_path, replace(QUICK, steps=100, learning_rate=1e-5))
    assert result.stopped == "the loss was not finite at step 3"
    assert result.best_step == 0
    assert all(torch.equal(good[name], tensor) for name, tensor in result.state.items())


def test_damaged_weights_are_refused_at_the_start(tiny: Callable[..., Path], tmp_path: Path) -> None:
    made = distiller(tiny)
    made.student.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(VerificationError, match="not finite before any training"):
        run(made, tmp_path, QUICK)


def test_minutes_end_the_training_and_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("moetools.training.schedule.time.monotonic", lambda: clock[0])
    pace = Pace(steps=10_000, seconds=100)

    class State:
        log_history: tuple[dict[str, float], ...] = ()
        global_step = 0

    pace.on_train_begin(None, State(), None)  # type: ignore[arg-type]
    factors = []
    for second in range(0, 101, 10):
        clock[0] = float(second)
        factors.append(pace.factor(second))
    assert factors[1] == max(factors)
    assert factors[-1] == 0
    assert factors[1:] == sorted(factors[1:], reverse=True)


def test_the_schedule_of_steps_warms_up_and_ends_at_zero() -> None:
    pace = Pace(steps=100)
    factors = [pace.factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 3)
    assert max(factors) == factors[2]
    assert factors[100] == 0


def test_planned_steps() -> None:
    options = TrainOptions(train_batch_size=4, accumulate=2)
    assert planned_steps(replace(options, steps=7), 100, 1) == 7
    assert planned_steps(replace(options, epochs=2.0), 100, 1) == 24
    assert planned_steps(replace(options, epochs=2.0), 100, 3) == 8
    assert planned_steps(replace(options, steps=7, epochs=2.0), 100, 1) == 7
    assert planned_steps(replace(options, max_minutes=1.0), 100, 1) > 1000


def test_bad_options_are_refused() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"steps": 0}, "`steps=0`"),
        ({"max_minutes": -1.0}, "`max_minutes=-1.0`"),
        ({"learning_rate": float("nan")}, "`learning_rate=nan`"),
        ({"train_batch_size": 0}, "`train_batch_size=0`"),
        ({"alpha": 1.5}, "`alpha=1.5`"),
        ({"divergence": "kl"}, "`divergence=kl`"),
        ({"hidden_weight": -1.0}, "`hidden_weight=-1.0`"),
    ]
    for settings, message in bad:
        with pytest.raises(UserError, match=message):
            TrainOptions(**settings).check()


def test_tensorboard_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the package tensorboard"):
        TrainOptions(tensorboard=tmp_path).check()


def test_event_files_are_written(tiny: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(distiller(tiny), tmp_path, replace(QUICK, steps=4, tensorboard=tmp_path / "events"))
    assert list((tmp_path / "events").glob("events.out.*"))


def test_tiny_data_is_refused() -> None:
    batch = TokenBatch(input_ids=torch.ones(1, 4, dtype=torch.int64), attention_mask=None, task=torch.zeros(1).long())
    with pytest.raises(DataError, match="at least 2 sequences"):
        split_sequences(TokenData(tasks=("t",), batches=(batch,), fingerprint="", seq_len=4), seed=0)


def test_vocabularies_of_other_sizes() -> None:
    assert common_vocabulary(128, 128, 120) == 128
    assert common_vocabulary(128, 160, 120) == 128  # the student's is padded
    with pytest.raises(UserError, match="the student 100"):
        common_vocabulary(128, 100, 120)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "phimoe", "gpt_oss", "deepseek_v3"])
def test_heads_are_understood(family: str, tiny: Callable[..., Path]) -> None:
    """Granite divides its logits, Phi adds a bias."""
    check_head(load_whole(tiny(family), dtype=torch.float32, device=CPU, trainable=False), tiny(family))


def test_two_processes_do_what_one_does(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Same global batch; and sharded as under FSDP2, the module gives the same loss and gradients."""
    whole = run(distiller(tiny), tmp_path / "one", replace(QUICK, steps=6), padded=True)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", str(Path(__file__).with_name("two_processes.py"))]
    command += [str(tiny("mixtral")), str(tiny("mixtral", seed=1)), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert [point["loss"] for point in curve] == pytest.approx([point["loss"] for point in whole.curve], rel=1e-5)
    assert json.loads((tmp_path / "sharded.json").read_text()) < 1e-5


def test_sharding_needs_gpus(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shards over GPUs"):
        run(distiller(tiny), tmp_path, replace(QUICK, fsdp=True))


def test_checks_measure_the_weights_as_they_will_be_on_disk(tiny: Callable[..., Path], tmp_path: Path) -> None:
    made = distiller(tiny)
    exact = {name: tensor.clone() for name, tensor in made.student.state_dict().items()}
    name = "model.layers.1.mlp.gate.weight"
    parameter = made.student.get_parameter(name)
    stored = dict.fromkeys(exact, torch.float32) | {name: torch.float8_e4m3fn}
    result = train(
        made,
        sequences(),
        replace(QUICK, steps=1, learning_rate=1e-30),
        tmp_path,
        metrics=tmp_path / "metrics.jsonl",
        stored=stored,
        progress=Silent(),
    )
    assert torch.equal(result.state[name], exact[name].to(torch.float8_e4m3fn).float())
    assert not torch.equal(result.state[name], exact[name])
    torch.testing.assert_close(parameter.data, exact[name])


def test_text_for_less_than_a_batch_trains_all_the_same(tiny: Callable[..., Path], tmp_path: Path) -> None:
    found = sequences()
    few = replace(found, training=found.training[:3])
    result = train(distiller(tiny), few, QUICK, tmp_path, metrics=tmp_path / "metrics.jsonl", progress=Silent())
    assert result.steps == 12
    assert result.tokens == 12 * 3 * 11
