"""What `moetools route-tasks` hands to its verb."""

from pathlib import Path

import pytest

from moetools.forward.options import ForwardOptions
from moetools.text.options import DataOptions


@pytest.fixture
def recorded(stub, report):
    calls = []

    def record(*args, progress, **options):
        progress.stop()
        calls.append((args, options))
        return report

    stub("route.verb", RouteOptions=dict, route_tasks=record)
    return calls


def test_route_tasks_passes_everything_on(moetools, recorded):
    flags = "--keep 4 --score gate --union a+b --union all --refit joint --tune-router 5 --test a=x --test b=y"
    levels = "--level sentence --level sequence --pool seq-topk --classifier router --prefix 9 --threshold 0.5"
    rest = "--overwrite --resume --dry-run --no-verify --no-report --seed 7 --device cpu --quiet"
    line = f"route-tasks m o --data a=1.txt --data b=2.txt --seq-len 64 {flags} {levels} {rest}"
    assert moetools(*line.split()).code == 0
    ((args, options),) = recorded
    choice = {
        "score": "gate",
        "keep": 4,
        "top_p": None,
        "unions": ("a+b", "all"),
        "refit": "joint",
        "tune_router": 5,
        "levels": ("sentence", "sequence"),
        "pools": ("seq-topk",),
        "classifier": "router",
        "prefix": 9,
        "threshold": 0.5,
        "test": ("a=x", "b=y"),
        "report": False,
        "overwrite": True,
        "resume": True,
        "dry_run": True,
        "verify": False,
        "seed": 7,
    }
    data = DataOptions(data=["a=1.txt", "b=2.txt"], seq_len=64, seed=7)
    assert args == (Path("m"), Path("o"), data, ForwardOptions(device="cpu"), choice)
    assert options == {"command": f"moetools {line}"}


def test_it_needs_text(moetools, recorded):
    outcome = moetools("route-tasks", "m", "o", "--keep", "4")
    assert outcome.code == 2
    assert "hint: --data NAME=FILE" in outcome.err
    assert not recorded
