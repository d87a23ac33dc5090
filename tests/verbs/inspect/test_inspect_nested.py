"""Families whose text model has a part of config.json of its own, and such that are not described."""

from pathlib import Path

import pytest

from moetools.verbs.inspect.summary import ModelSummary
from moetools.verbs.inspect.verb import inspect
from tests.families_contract import make_shrunk


def shown(summary: ModelSummary) -> dict[str, str]:
    return dict(summary.tables()[0].rows)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "kimi_k25"])
def test_experts_of_a_nested_text_model(family: str, tmp_path: Path) -> None:
    summary = inspect(make_shrunk(family, tmp_path / family))
    assert (summary.experts, summary.top_k, summary.layers, summary.hidden_size) == (8, 2, 4, 32)
    assert summary.moe_layers[-1] == 3
    assert summary.active_parameters < summary.parameters
    assert summary.kv_cache_bytes


def test_what_is_not_described_is_not_called_dense(tmp_path: Path) -> None:
    summary = inspect(make_shrunk("dbrx", tmp_path / "dbrx"))
    assert (summary.experts, summary.active_parameters, summary.layers) == (None, None, 4)
    assert "dense" not in shown(summary)["family"]
    assert shown(summary)["experts per MoE layer"] == "not described"
