"""Progress against a clock that the test turns."""

import io
import os
import shutil
import sys

import pytest
from rich.console import Console

from moetools.cli.console import is_numeric, render_tables
from moetools.cli.progress import BarProgress, LineProgress, Pace, format_seconds
from moetools.forward.progress import PhaseClock, Silent
from moetools.pipeline.table import Table


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_pace_counts_whole_model_tokens(clock):
    pace = Pace("calibrate", layers=4, tokens=1000, clock=clock)
    assert str(pace) == "layer 1/4"
    pace.layer(0)
    pace.advance(1000)
    pace.layer(1)
    pace.advance(500)
    clock.now += 3
    # 1,500 of 4,000 layer-tokens in 3 s: 125 tokens/s through 4 layers, 2,500 layer-tokens left = 5 s.
    assert pace.tokens_per_second == pytest.approx(125)
    assert pace.remaining == pytest.approx(5)
    assert str(pace) == "layer 2/4  125 tokens/s  ETA 5.0 s"


def test_what_a_layer_does_besides_counts_for_the_time_that_is_left(clock):
    """10 MoE layers behind a dense one, each 2 s of text and 8 s of solving: right from the second MoE layer on."""
    pace = Pace("reduce", layers=11, tokens=1000, weights=[1.0, *[10.0] * 10], clock=clock)
    total = 1 + 10 * 10
    for layer in range(11):
        pace.layer(layer)
        for second in range(10):
            spent = clock.now - 100
            if layer == 1:
                assert pace.remaining is None
            if layer > 1:
                assert pace.remaining == pytest.approx(total - spent, rel=1e-6, abs=1e-6)
            clock.now += 1 if layer else 0.1
            if second == 1:
                pace.advance(1000)
                pace.phase = "solving"
        assert f"layer {layer + 1}/11 solving" in str(pace)


def test_layers_that_are_read_back_are_soon_forgotten(clock):
    pace = Pace("reduce", layers=40, tokens=0, clock=clock)
    for layer in range(30):
        pace.layer(layer)
        clock.now += 0.01 if layer < 20 else 10
    pace.layer(30)
    assert pace.remaining == pytest.approx(100)


def test_phases_of_all_layers_add_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("moetools.forward.progress.time.monotonic", lambda: now[0])
    seen = PhaseClock(Silent())
    for _ in range(2):
        seen.start("reduce", layers=2, tokens=0)
        for layer in range(2):
            seen.layer(layer)
            now[0] += 1
            seen.phase("solving")
            now[0] += 2
            seen.phase("writing")
            now[0] += 3
        seen.stop()
        now[0] += 100
    assert seen.seconds == {"solving": 8.0, "writing": 12.0}


def test_layers_left_out_are_not_speed(clock):
    pace = Pace("compress", layers=4, tokens=1000, clock=clock)
    pace.layer(2)
    pace.advance(1000)
    clock.now += 2
    assert pace.tokens_per_second == pytest.approx(125)
    assert pace.remaining == pytest.approx(2)


def test_pass_without_tokens_counts_layers(clock):
    lines = []
    pace = Pace("write", layers=4, tokens=0, clock=clock)
    progress = LineProgress(lines.append, clock=clock)
    progress.start("write", layers=4, tokens=0)
    for layer in range(4):
        pace.layer(layer)
        progress.layer(layer)
        assert pace.complete is (layer == 3)
        clock.now += 2
    # The last of four layers has taken as long as the others did.
    assert pace.tokens_per_second is None
    assert pace.remaining == 0
    progress.stop()
    assert lines == ["write: 4 layers, 8.0 s"]


def test_lines_one_per_pass_and_one_a_minute(clock):
    lines = []
    progress = LineProgress(lines.append, clock=clock)
    progress.start("calibrate", layers=2, tokens=6000)
    for layer in range(2):
        progress.layer(layer)
        clock.now += 50
        progress.advance(6000)
    progress.stop()
    progress.stop()
    assert lines == [
        "calibrate: layer 2/2  60 tokens/s  ETA 0.0 s",
        "calibrate: 2 layers, 6,000 tokens, 1:40 (60 tokens/s)",
    ]


def test_line_of_a_pass_that_failed(clock):
    lines = []
    progress = LineProgress(lines.append, clock=clock)
    progress.start("calibrate", layers=2, tokens=100)
    progress.layer(0)
    progress.stop()
    assert lines == ["calibrate: 2 layers, 100 tokens, 0.0 s, stopped in layer 1"]


def test_bar_shows_task_layer_speed_and_eta(clock):
    page = io.StringIO()
    progress = BarProgress(Console(file=page, force_terminal=True, width=120, color_system=None), clock=clock)
    progress.start("calibrate [code]", layers=2, tokens=100)
    progress.layer(1)
    clock.now += 2
    progress.advance(50)
    progress.stop()
    progress.stop()
    assert "calibrate [code]" in page.getvalue()
    assert "layer 2/2  12 tokens/s  ETA 2.0 s" in page.getvalue()


def test_bar_without_tokens(clock):
    page = io.StringIO()
    progress = BarProgress(Console(file=page, force_terminal=True), clock=clock)
    progress.start("nothing", layers=0, tokens=0)
    progress.stop()
    assert "tokens/s" not in page.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.84, "0.8 s"), (42.4, "42 s"), (59.7, "1:00"), (187, "3:07"), (3723, "1:02:03")]
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("cells", "numeric"),
    [
        (["1", "2,048", "-"], True),
        (["7.6 MB", "1.2e-05", "+3.1%"], True),
        (["3.82 M", "110 tokens/s"], True),
        (["mixtral-8x9m", "1"], False),
        (["8x9m"], False),
        (["-", ""], False),
        (["8 of 16"], False),
    ],
)
def test_numeric_columns(cells, numeric):
    assert is_numeric(cells) is numeric


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (16, ["Model   KL   MB", "a        1    2", "b        3    4"]),
        (12, ["Model   a   b", "KL      1   3", "MB      2   4"]),
    ],
    ids=["fits", "too wide"],
)
def test_a_table_too_wide_for_the_terminal_lies_on_its_side(monkeypatch, width, lines):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((width + 1, 24)))
    heading, _, *rows = render_tables(
        [Table("", ["Model", "KL", "MB"], [["a", "1", "2"], ["b", "3", "4"]])]
    ).splitlines()
    assert [heading, *rows] == lines
