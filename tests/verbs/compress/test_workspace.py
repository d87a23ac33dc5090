"""The folder in which plans are measured: one run at a time, nothing lost, nothing of others touched."""

from pathlib import Path

import pytest

from moetools.checkpoint import durable
from moetools.errors import CheckpointError, UserError
from moetools.verbs.compress.workspace import Workspace


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "out")


def opened(out: Path, *, resume: bool = False) -> Workspace:
    work = Workspace(out)
    work.open(resume=resume)
    return work


def plan(work: Workspace) -> Path:
    folder = work.plans / "0" / "out"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("new")
    return folder


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_plan_takes_the_place_of_the_output(there, exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(durable, "exchange", lambda *_: False)
    if there:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/config.json").write_text("old")
    work = opened(tmp_path / "out")
    work.publish(plan(work), overwrite=True)
    work.close(keep=False)
    assert (tmp_path / "out/config.json").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_died_behind_the_last_step_is_cleared_away(tmp_path):
    work = opened(tmp_path / "out")
    work.measured.write_text("{}")
    work.publish(plan(work), overwrite=True)
    work._lock.close()
    Workspace(tmp_path / "out").check(resume=False, overwrite=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_an_output_that_was_set_aside_comes_back(tmp_path):
    work = opened(tmp_path / "out")
    (work.path / "replaced").mkdir()
    (work.path / "replaced/config.json").write_text("old")
    work._lock.close()
    opened(tmp_path / "out").close(keep=False)
    assert (tmp_path / "out/config.json").read_text() == "old"


def test_two_runs_do_not_share_it(tmp_path):
    first = opened(tmp_path / "out")
    first.measured.write_text("{}")
    for how in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        with pytest.raises(UserError, match="another moetools run"):
            Workspace(tmp_path / "out").check(**how)
    with pytest.raises(UserError, match="another moetools run"):
        opened(tmp_path / "out")
    first.close(keep=True)
    second = opened(tmp_path / "out", resume=True)
    assert second.measured.exists()
    second.close(keep=False)
    assert not second.path.exists()


@pytest.mark.parametrize("name", ["", "probes", "probes.json", "lock", "mine"])
def test_a_folder_that_is_not_ours_is_not_touched(name, work, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").touch()
    if name:
        work.path.mkdir()
    (work.path / name).symlink_to(victim)
    for how in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        with pytest.raises(CheckpointError, match="not what a run leaves"):
            work.check(**how)
    assert (victim / "kept").exists()
