"""A folder that only one run writes to, and files that are whole or as they were."""

from pathlib import Path

import pytest

from moetools.checkpoint import lock as lock_module
from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.lock import lock_folder
from moetools.errors import UserError


def test_the_second_waits_until_the_first_gives_it_back(tmp_path: Path) -> None:
    first = lock_folder(tmp_path / "folder", "lock", tmp_path / "out")
    with pytest.raises(UserError, match=r"another moetools run is writing '.*out'"):
        lock_folder(tmp_path / "folder", "lock", tmp_path / "out")
    first.close()
    lock_folder(tmp_path / "folder", "lock", tmp_path / "out").close()


@pytest.mark.parametrize("there", [True, False])
def test_a_disk_that_fails_leaves_no_folder_behind(there: bool, tmp_path: Path, monkeypatch) -> None:
    """Found by the fault driver: a full disk behind the making of the folder left it, without a word."""
    if there:
        (tmp_path / "folder").mkdir()

    def fail(_folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock_module, "sync_folder", fail)
    with pytest.raises(OSError, match="No space"):
        lock_folder(tmp_path / "folder", "lock", tmp_path / "out")
    assert (tmp_path / "folder").exists() is there


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_file_that_cannot_be_written_leaves_the_old_one_alone(step: str, tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(f"os.{step}", fail)
    with pytest.raises(OSError, match="No space"):
        write_durably(tmp_path / "file", b"new")
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"file": "old"}
