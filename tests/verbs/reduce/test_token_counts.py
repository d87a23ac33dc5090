"""Too little text: which experts lack tokens, how many there should be, and when a run is refused."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reducing import reduce
from safetensors.torch import save_file

from moetools.checkpoint.writer import CheckpointWriter
from moetools.errors import StatisticsError, UserError
from moetools.passes.token_counts import check_token_counts
from moetools.text.options import DataOptions
from moetools.verbs.reduce.report import ReduceReport


def check(*counts: int, needed: int = 32, tokens: int = 100) -> str | None:
    return check_token_counts(3, dict(enumerate(counts)), needed, tokens, user="method 'x'")


def test_enough_tokens_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert check(32, 40) is None
    assert check(0, 0, needed=0) is None
    assert not caplog.records


def test_dead_experts_are_not_short_of_text() -> None:
    assert check(0, 9600, 3200, 0) is None
    assert check(0, 9600, 3199, 0) is not None
    assert check(1, 9600, 3200, 0) is not None


def test_a_few_poor_experts_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    message = check(8, 90, 0, 100)
    assert message is not None
    assert "layer 3: 2 of 4 experts got fewer than the 32 calibration tokens that method 'x' needs" in message
    assert "0 (8), 2 (0)" in message
    assert "about 400 calibration tokens instead of 100 would do (1 of these were never chosen)" in message
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.WARNING, message)]


def test_mostly_poor_experts_are_refused() -> None:
    with pytest.raises(StatisticsError, match=r"2 of 3 experts .*: 0 \(16\), 2 \(31\)") as caught:
        check(16, 90, 31)
    assert caught.value.hint == "about 200 calibration tokens instead of 100 would do"
    with pytest.raises(StatisticsError, match=r"0 \(0\), 1 \(0\), .* and 3 more") as caught:
        check(*[0] * 9)
    assert "none of these was chosen in 100 tokens" in caught.value.hint


def run(verb: str, model: Path, folder: Path, ids: torch.Tensor, **options: object) -> ReduceReport:
    save_file({"input_ids": ids}, folder / "tokens.safetensors")
    data = DataOptions(data=[f"t={folder / 'tokens.safetensors'}"], seq_len=ids.shape[1], batch_size=4)
    return reduce(verb, model, folder / "out", data, target=4, **options)


@pytest.mark.parametrize(
    ("verb", "method"), [("prune", "reap"), ("merge", "hc-smoe"), ("merge", "ream"), ("merge", "sub-moe")]
)
def test_a_handful_of_tokens_is_refused_before_anything_is_written(
    verb: str, method: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = CheckpointWriter.write_unit

    def only_rest(self: CheckpointWriter, unit: str, *rest: object) -> None:
        if unit != "rest":
            pytest.fail("a layer was written")
        write(self, unit, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointWriter, "write_unit", only_rest)
    ids = torch.randint(2, 128, (2, 10), generator=torch.Generator().manual_seed(0))
    with pytest.raises(StatisticsError, match=f"of 8 experts .* that method '{method}' needs of each") as caught:
        run(verb, tiny("mixtral"), tmp_path, ids, method=method)
    assert "calibration tokens instead of 20 would do" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["frequency", "gate-mass", "random"])
def test_methods_that_count_use_need_no_number_of_tokens(
    method: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    report = run("prune", tiny("mixtral"), tmp_path, torch.randint(2, 128, (2, 10)), method=method)
    assert report.warnings == ()


def test_warnings_are_in_the_report(
    tiny: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = torch.randint(2, 128, (2, 130), generator=torch.Generator().manual_seed(1))
    report = run("prune", tiny("mixtral"), tmp_path, ids, method="reap")
    assert report.warnings
    assert [record.getMessage() for record in caplog.records if record.name.endswith("token_counts")] == [
        *report.warnings
    ]
    assert report.tables()[-1].title == "warnings"


@pytest.mark.parametrize("refit", ["joint", "members"])
def test_a_refit_needs_sequences_to_hold_out(refit: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    ids = torch.randint(2, 128, (5, 100))
    with pytest.raises(UserError, match=f"`refit={refit}` chooses its ridge on every 7th sequence, and 5 sequences"):
        run("merge", tiny("mixtral"), tmp_path, ids, method="m-smoe", refit=refit)


def test_more_unknowns_than_tokens_are_warned_of(tiny: Callable[..., Path], tmp_path: Path) -> None:
    ids = torch.randint(2, 128, (16, 10), generator=torch.Generator().manual_seed(0))
    options = {"method": "m-smoe", "refit": "joint", "router": "fitted"}
    report = run("merge", tiny("mixtral", hidden_size=168, intermediate_size=80), tmp_path, ids, **options)
    assert report.warnings == (
        "`refit=joint` solves for 320 neurons of a layer from 160 tokens; more text than that gives a better result",
        "`router=fitted` solves for 168 numbers per router row from 160 tokens; more text than that gives a better "
        "result",
    )
