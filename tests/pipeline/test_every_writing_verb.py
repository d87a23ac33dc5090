"""What the pipeline promises, for every verb that writes: resume is real, tampering is found, inputs are left alone."""

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from writing_verbs import CASES, CPU, LAYERS, Case, Material, watching

from moetools.checkpoint.headers import read_header
from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.writer import CheckpointWriter
from moetools.errors import CheckpointError, UserError, VerificationError
from moetools.forward.stock import StockModel
from moetools.pipeline.options import Writing
from moetools.training.options import TrainOptions
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.distill.verb import distill
from moetools.verbs.reduce.options import PruneOptions
from moetools.verbs.reduce.verb import prune_experts

VARY = {"seconds", "peak_memory", "tokens_per_second", "verified"}
"""Of a report: what is measured on the machine, and what only some of the runs do."""
QUICK = Writing(verify=False)
STOPS = [
    pytest.param(name, stop, id=f"{name}, {'/'.join(stop)}") for name, case in CASES.items() for stop in case.stops
]

VERBS = [name for name in CASES if name != "route-tasks tuned"]
"""Tuning shares its code with healing."""
LAST_STOPS = [one for one in STOPS if one.values[1] == list(CASES[one.values[0]].stops)[-1]]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    # Accelerate collects garbage behind every training, which takes longer than the training here.
    gc.collect()
    gc.freeze()
    return Material.make(tmp_path_factory.mktemp("material"))


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: digests of its files, its report, and what it solved."""

    files: dict[str, str]
    report: Any
    solved: dict[str, int]


@pytest.fixture(scope="module")
def whole(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """Made once per verb."""
    made: dict[str, Whole] = {}

    def make(name: str) -> Whole:
        if name not in made:
            folder = tmp_path_factory.mktemp("whole")
            with watching() as solved:
                report = CASES[name].run(material, folder / "out", QUICK)
            made[name] = Whole(weights(folder / "out"), facts(report, folder), dict(solved))
        return made[name]

    return make


def weights(folder: Path) -> dict[str, str]:
    """Digests of what determines the model."""
    found = {path for kind in ("*.safetensors", "config.json", "task_routing.json") for path in folder.rglob(kind)}
    return {str(path.relative_to(folder)): digest(path) for path in sorted(found)}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder: Path) -> dict[str, str]:
    return {str(path): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def facts(report: Any, folder: Path) -> Any:
    """All that a report says, less what varies."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(one) for key, one in value.items() if key not in VARY}
        return [kept(one) for one in value] if isinstance(value, list) else value

    plain = json.loads(json.dumps(report.to_json(), default=str).replace(str(folder), "HERE"))
    return kept(plain)


@contextmanager
def stopping(stop: tuple[str, str]) -> Iterator[None]:
    """A run in it is interrupted as soon as that unit of that staging folder is finished."""
    write_unit = CheckpointWriter.write_unit

    def interrupted(self: CheckpointWriter, unit: str, *args: Any) -> None:
        write_unit(self, unit, *args)
        if (self.staging.name, unit) == (f".{stop[0]}.moetools-staging", stop[1]):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "write_unit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


def flip(file: Path, name: str) -> None:
    """Change one bit in the middle of a tensor."""
    (info,) = (one for one in read_header(file).tensors if one.name == name)
    with file.open("r+b") as stream:
        stream.seek(info.offset + info.nbytes // 2)
        (byte,) = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 4]))


def in_layer(file: Path, layer: int) -> str | None:
    """The largest tensor of a layer in a file."""
    found = [one for one in read_header(file).tensors if f".layers.{layer}." in one.name]
    return max(found, key=lambda one: one.nbytes).name if found else None


@pytest.mark.parametrize("name", CASES)
def test_a_whole_run_solves_every_layer_once(name: str, whole: Callable[[str], Whole]) -> None:
    assert whole(name).solved == CASES[name].solves


@pytest.mark.parametrize("name", CASES)
def test_threads_budgets_and_batches_change_no_weight(
    name: str, material: Material, whole: Callable[[str], Whole], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of those that they may change (docs/architecture.md, Determinism) stay as they are."""
    batch_size = 14 if "joint" in name or name in ("prune with MTP", "distill closed form", "distill trained") else 7
    text, threads = Material.text, torch.get_num_threads()
    roomy = name.startswith("route") or name in ("prune with MTP", "distill closed form", "distill trained")
    budget = 30_000_000 if roomy else 3_000_000
    monkeypatch.setattr("writing_verbs.CPU", replace(CPU, memory_budget=budget))
    monkeypatch.setattr(Material, "text", lambda *tasks: replace(text(*tasks), batch_size=batch_size))
    torch.set_num_threads(CASES[name].threads)
    try:
        CASES[name].run(material, tmp_path / "out", QUICK)
    finally:
        torch.set_num_threads(threads)
    assert weights(tmp_path / "out") == whole(name).files


@pytest.mark.parametrize("name", ["prune sequential joint", "merge joint"])
def test_batches_change_a_joint_refit_by_rounding_only(
    name: str, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Material.text
    CASES[name].run(material, tmp_path / "one", QUICK)
    monkeypatch.setattr(Material, "text", lambda *tasks: replace(text(*tasks), batch_size=7))
    CASES[name].run(material, tmp_path / "other", QUICK)
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "other"))
    for tensor, values in one.items():
        assert (other[tensor].float() - values.float()).norm() <= 0.01 * values.float().norm(), tensor


@pytest.mark.parametrize(("name", "stop"), STOPS)
def test_a_resumed_run_solves_only_the_rest(
    name: str, stop: tuple[str, str], material: Material, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    case, out = CASES[name], tmp_path / "out"
    with watching() as before, stopping(stop):
        case.run(material, out, Writing())
    assert dict(before) == case.stops[stop]
    assert not out.exists()
    with pytest.raises(UserError, match="interrupted run left"):
        case.run(material, out, Writing())
    with watching() as after:
        report = case.run(material, out, Writing(resume=True))
    assert before + after == whole(name).solved
    assert weights(out) == whole(name).files
    assert facts(report, tmp_path) == whole(name).report
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("name", VERBS)
def test_a_flipped_bit_in_a_staged_file_is_found_and_repaired(
    name: str, material: Material, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    out, assemble = tmp_path / "out", CheckpointWriter.assemble
    touched = "low" if name.startswith("route") else "out"

    def damaging(self: CheckpointWriter) -> Path:
        contents = assemble(self)
        if self.staging.name == f".{touched}.moetools-staging":
            file = contents / "model.safetensors"
            flip(file, in_layer(file, 1) or "")
        return contents

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "assemble", damaging)
        with pytest.raises(VerificationError) as found:
            CASES[name].run(material, out, Writing())
    assert found.value.exit_code == 3
    assert not out.exists()
    CASES[name].run(material, out, Writing(resume=True))
    assert weights(out) == whole(name).files


@pytest.mark.parametrize(("name", "stop"), LAST_STOPS)
def test_a_flipped_bit_in_a_finished_unit_is_made_again(
    name: str, stop: tuple[str, str], material: Material, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    """So is every layer behind it."""
    case, out = CASES[name], tmp_path / "out"
    with stopping(stop):
        case.run(material, out, Writing())
    (units,) = (folder for folder in tmp_path.rglob("units") if folder.parent.name == f".{stop[0]}.moetools-staging")
    (damaged,) = (file for file in units.iterdir() if in_layer(file, 0))
    flip(damaged, in_layer(damaged, 0) or "")
    with watching() as solved:
        case.run(material, out, Writing(resume=True, verify=False))
    assert weights(out) == whole(name).files
    assert dict(solved) == solved_again(case, stop[0])


@pytest.mark.parametrize(
    ("name", "stop", "file", "again"),
    [
        ("route-tasks", ("high", "layer-00001"), "low/model.safetensors", {"reduce": LAYERS + 1}),
        ("distill trained", ("out", "layer-00001"), "student/model.safetensors", {"fit": LAYERS}),
        ("merge healed", ("out", "layer-00001"), "student/model.safetensors", {"statistics": LAYERS}),
        ("distill student", ("out", "layer-00001"), "trained.safetensors", {"train": 1}),
    ],
)
def test_a_flipped_bit_in_what_leads_to_the_output_is_made_again(
    name: str,
    stop: tuple[str, str],
    file: str,
    again: dict[str, int],
    material: Material,
    whole: Callable[[str], Whole],
    tmp_path: Path,
) -> None:
    """Finished checkpoints on the way and a finished training."""
    case, out = CASES[name], tmp_path / "out"
    with stopping(stop):
        case.run(material, out, Writing())
    damaged = tmp_path / ".out.moetools-staging" / "scratch" / file
    flip(damaged, in_layer(damaged, 1) or "")
    with watching() as solved:
        case.run(material, out, Writing(resume=True, verify=False))
    assert weights(out) == whole(name).files
    assert {one: count for one, count in solved.items() if one != "measure"} == again


@pytest.mark.parametrize(
    ("name", "stop", "file", "again"),
    [
        ("prune one-shot", ("out", "layer-00001"), "statistics.safetensors", "measure"),
        ("quantize mixed", ("out", "layer-00001"), "widths.json", "widths"),
        ("route-tasks", ("low", "layer-00001"), "statistics.safetensors", "choose"),
    ],
)
def test_a_flipped_bit_in_what_was_measured_is_measured_again(
    name: str,
    stop: tuple[str, str],
    file: str,
    again: str,
    material: Material,
    whole: Callable[[str], Whole],
    tmp_path: Path,
) -> None:
    case, out = CASES[name], tmp_path / "out"
    with stopping(stop):
        case.run(material, out, Writing())
    damaged = tmp_path / ".out.moetools-staging" / "scratch" / file
    kept = bytearray(damaged.read_bytes())
    # A digit of a width, or a number at the end of the statistics.
    place = max(kept.rfind(digit) for digit in b"2345") if file.endswith(".json") else len(kept) - 2
    kept[place] ^= 1
    damaged.write_bytes(kept)
    with watching() as solved:
        case.run(material, out, Writing(resume=True, verify=False))
    assert solved[again] == 1
    assert weights(out) == whole(name).files


def test_the_student_of_a_training_is_named_where_it_will_be(whole: Callable[[str], Whole]) -> None:
    """Not in the staging folder, which is gone."""
    assert Path(whole("distill trained").report["training"]["student"]).name == "out"


def solved_again(case: Case, place: str) -> dict[str, int]:
    """What a run solves whose first layer was damaged in that staging folder; what was measured is kept."""
    layers = {one: count for one, count in case.solves.items() if one in ("statistics", "reduce", "quantize", "fit")}
    trained = {one: count for one, count in case.solves.items() if one == "train"}
    if place == "student":
        return layers | trained
    if trained:
        return {}
    # The first task's checkpoint is whole.
    return dict.fromkeys(layers, LAYERS) if place == "high" else layers


@pytest.mark.parametrize("name", VERBS)
def test_an_input_that_changes_meanwhile_leaves_no_output(name: str, material: Material, tmp_path: Path) -> None:
    case, read = CASES[name], StockModel.read_layer
    own = Material(tmp_path / "material")
    shutil.copytree(material.folder, own.folder)
    changed = getattr(own, next(one for one in ("student", "packed", "mtp", "model") if one in case.reads))
    pending = [changed / "model.safetensors"]

    def reading(self: StockModel, index: int) -> Any:
        if pending:
            file = pending.pop()
            flip(file, in_layer(file, 2) or "")
        return read(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StockModel, "read_layer", reading)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            case.run(own, tmp_path / "out", QUICK)
    assert not pending
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["truncated", "written again", "gone"])
def test_an_input_that_gets_shorter_or_is_written_again_leaves_no_output(
    damage: str, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written again: where the fingerprint samples nothing of the change."""
    own, read = Material(tmp_path / "material"), StockModel.read_layer
    shutil.copytree(material.folder, own.folder)
    file = own.model / "model.safetensors"

    def reading(self: StockModel, index: int) -> Any:
        if index == 1 and file.exists():
            if damage == "truncated":
                os.truncate(file, file.stat().st_size // 3)
            elif damage == "gone":
                file.unlink()
            else:
                flip(file, in_layer(file, 2) or "")
        return read(self, index)

    monkeypatch.setattr(StockModel, "read_layer", reading)
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda self: "the same")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        CASES["prune sequential joint"].run(own, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def untouched(material: Material, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No weight is read, and nothing on disk changes."""
    before = tree(material.folder)
    for owner, method in ((StockModel, "read_layer"), (Checkpoint, "read")):
        monkeypatch.setattr(owner, method, lambda *_, **__: pytest.fail("a weight was read"))
    yield
    assert tree(material.folder) == before


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", CASES)
def test_an_output_that_touches_an_input_is_refused(name: str, material: Material, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(material.folder)
    for path in CASES[name].paths(material):
        linked = link / path.relative_to(material.folder)
        for out, relation in (
            (path, "is"),
            (linked, "is"),
            (path.parent, "contains"),
            (path / "inside", "lies inside"),
            (linked / "inside", "lies inside"),
        ):
            with pytest.raises(UserError, match=rf"output '{out}' {relation} "):
                CASES[name].run(material, out, Writing(overwrite=True))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("name", "argument", "place"),
    [
        *((name, "save_stats", "model/model.safetensors") for name in ("prune one-shot", "merge healed")),
        ("prune one-shot", "save_stats", "text/low.safetensors"),
        ("prune one-shot", "save_stats", "model/statistics.safetensors"),
        *(
            (name, argument, place)
            for name in ("distill trained", "distill student")
            for argument in ("teacher_cache", "tensorboard")
            for place in ("model/new", "model", "text", "text/low.safetensors")
        ),
        ("distill student", "teacher_cache", "student/new"),
        ("distill student", "tensorboard", "student"),
    ],
)
def test_other_files_that_touch_an_input_are_refused(
    name: str, argument: str, place: str, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetools.training.options.importlib.util.find_spec", lambda _: True)
    with pytest.raises(
        UserError, match=rf"`{argument}`:? '.*' (is|contains|lies inside|exists and holds no statistics)"
    ):
        CASES[name].run(material, tmp_path / "out", Writing(), **{argument: material.folder / place})
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("untouched")
def test_texts_of_one_name_are_all_left_alone(material: Material, tmp_path: Path) -> None:
    """The text that layers are fitted on, and the one a student is trained on, may be tasks of the same name."""
    text = material.text("low")
    other = tmp_path / "other"
    shutil.copytree(material.folder / "text", other)
    named = [f"low={other}/low.safetensors"]
    student, pruned = StudentOptions(calibration=named), PruneOptions(keep=4, heal=2, heal_data=named)
    for out in (other, material.folder / "text"):
        with pytest.raises(UserError, match=rf"output '{out}' contains "):
            distill(material.model, out, student, TrainOptions(steps=2), text, CPU, Writing(overwrite=True))
        with pytest.raises(UserError, match=rf"output '{out}' contains "):
            prune_experts(material.model, out, pruned, text, CPU, Writing(overwrite=True))
