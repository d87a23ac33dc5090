"""The quick part of the fault driver: two verbs under every kind of fault, and that the driver sees a loss.

`python tests/faults/long_run.py --kills 500` is the long part.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "pipeline"))

from trial import STAGING, Ended, LostError, Place, Reference, weights
from writing_verbs import Material

DRIVER = Path(__file__).parent / "long_run.py"


def test_two_verbs_lose_nothing_under_any_fault() -> None:
    verbs = ["--verb", "prune sequential joint", "--verb", "expand"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, DRIVER, *verbs, "--rounds", "1", "--kills", "0", "--no-walk"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said
    last = re.findall(r"(\d+) / (\d+) / (\d+)", ended.stdout.splitlines()[-1])
    kinds, everything = last[:-1], last[-1]
    assert len(kinds) == 9
    assert all(lost == "0" and injected == survived for injected, survived, lost in last), said
    assert int(everything[0]) >= 12, "what is sent at a random moment may come too late"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    material = Material(tmp_path / "material")
    material.model.mkdir(parents=True)
    (material.model / "config.json").write_text("{}")
    found = Place(material, tmp_path).__enter__()
    found.out.mkdir()
    (found.out / "config.json").write_text("{}")
    return found


def reference(place: Place) -> Reference:
    return Reference(weights(place.out), seconds=1.0, steps=1, lines=1, reads=1, longest_file=1, bytes=1)


WELL, KILLED = Ended(0, ""), Ended(-signal.SIGKILL, "")


def test_a_complete_output_is_no_loss(place: Place) -> None:
    place.check(WELL, reference(place))
    (place.out.parent / STAGING).mkdir()
    place.check(KILLED, reference(place))
    place.check(Ended(130, "hint: run it again with --resume"), reference(place))


@pytest.mark.parametrize(
    ("damage", "ended", "said"),
    [
        ("run/out/config.json", WELL, "OUT is not complete"),
        ("material/model/config.json", WELL, "an input changed"),
        (f"run/{STAGING}", WELL, "ended well and left"),
        (f"run/{STAGING}", Ended(1, "error: no"), "without a word"),
        ("run/.out.other", KILLED, "left behind"),
        ("tmp/hidden", WELL, "temporary files are left"),
        ("", Ended(1, "internal error: KeyError"), "said: internal error"),
        ("", Ended(-signal.SIGBUS, ""), "died of SIGBUS"),
    ],
)
def test_a_loss_is_seen(damage: str, ended: Ended, said: str, place: Place) -> None:
    expected = reference(place)
    if damage.startswith("material"):
        (place.material.folder.parent / damage).write_text("[]")
    elif damage:
        (place.folder / damage).write_text("[]")
    with pytest.raises(LostError, match=said):
        place.check(ended, expected)
