"""What a dry run says of the time: the first layers are made on parts of the text, by a clock that the test moves."""

import logging
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from moetools.errors import StatisticsError
from moetools.formats.reader import open_model
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.pipeline import estimate
from moetools.pipeline.estimate import Rehearsal
from moetools.pipeline.options import Writing
from moetools.pipeline.work import Unit, Work
from moetools.text.tokens import TokenBatch, TokenData
from tests.pipeline.writing_verbs import CASES, LAYERS, Material

CPU = ForwardOptions(device="cpu")
BEFORE, LAYER, REST, PER_TOKEN = 3.0, 2.0, 1.0, 0.01


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def text(batches: int, tasks: int = 2) -> TokenData:
    ids = torch.arange(2, 34).view(4, 8)
    made = [
        TokenBatch(input_ids=ids, attention_mask=None, task=torch.full((4,), task))
        for task in range(tasks)
        for _ in range(batches)
    ]
    return TokenData(tasks=tuple("ab"[:tasks]), batches=tuple(made), fingerprint="", seq_len=8)


class Timed(Work[Any]):
    """Copies a model; every part takes the time that the constants say."""

    def __init__(self, model: Path, data: TokenData | None, clock: Clock, least: int = 0) -> None:
        self.source = open_model(model)
        self.model = StreamedModel(self.source, CPU)
        self.data, self.clock, self.least = data, clock, least
        self.seen: list[int] = []

    @property
    def tokens(self) -> int:
        return self.data.num_tokens if self.data else 0

    def prepare(self, scratch: Path) -> None:
        assert self.rehearsed
        if self.tokens < self.least:
            raise StatisticsError("too little text")
        self.clock.now += BEFORE * self.model.num_layers / LAYERS

    def output(self) -> StreamedModel:
        return self.model

    def units(self, finished: Any) -> Generator[Unit]:
        assert len(finished) == 0
        self.clock.now += REST
        yield Unit(index=None, tensors={}, on_disk=dict)
        for layer in self.model.layers(keep_native=True, fill=False):
            self.clock.now += LAYER + PER_TOKEN * self.tokens
            self.seen.append(layer.index)
            assert layer.native is not None
            yield Unit(index=layer.index, tensors=layer.native, on_disk=dict)

    def expected_bytes(self) -> int:
        return 10**9

    def memory(self) -> Any: ...

    def settings(self) -> Any: ...

    def report(self, outcome: Any) -> Any: ...


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(estimate, "time", made)
    return made


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material.make(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("least", [0, 10**4], ids=["parts", "too little for parts"])
@pytest.mark.parametrize("data", [None, text(100), text(1), text(3, tasks=1)], ids=["no text", "much", "two", "three"])
def test_parts_of_the_text_tell_the_time_of_all(
    material: Material, clock: Clock, data: TokenData | None, least: int
) -> None:
    if data is None:
        least = 0
    if least:
        least = data.num_tokens  # type: ignore[union-attr]
    work = Timed(material.model, data, clock, least)
    memory = work.model.memory_plan(data.batches if data else [])
    tokens = data.num_tokens if data else 0
    made = BEFORE + REST + LAYERS * (LAYER + PER_TOKEN * tokens)
    if data is not None and (least or data.num_sequences == 8):
        # One point tells no constant part: all of it grows with the text.
        assert Rehearsal(memory, verify=False).units(work) >= made + 2.0
    else:
        assert Rehearsal(memory, verify=False).units(work) == pytest.approx(made + 2.0)
        assert Rehearsal(memory, verify=True).units(work) == pytest.approx(made + 4.0 + 3.0)
    assert set(work.seen) == {0}, "one layer stands for all of its kind"
    assert work.model.num_layers == LAYERS
    assert not work.rehearsed


def test_a_part_has_whole_batches_of_every_task() -> None:
    part = estimate._part(text(100), 8)
    assert len(part.batches) == 2 * 12
    assert part.tokens_per_task() == {"a": 12 * 32, "b": 12 * 32}
    assert len(estimate._part(text(1), 16).batches) == 2


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_of_every_writing_verb_tells_the_time_and_leaves_nothing(
    name: str, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(logging.root.manager, "disable", logging.ERROR)
    report = CASES[name].run(material, tmp_path / "out", Writing(dry_run=True))
    assert report.seconds["expected"] > 0
    assert logging.root.manager.disable == logging.ERROR, "what was switched off stays so"
    assert list(tmp_path.rglob("*")) == [tmp_path / "temporary"]
