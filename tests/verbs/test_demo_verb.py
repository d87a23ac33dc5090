"""The demo from an empty folder to its table."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from moetools.errors import UserError
from moetools.forward.options import ForwardOptions
from moetools.verbs.demo import demo
from moetools.verbs.demo_options import DemoOptions


def test_the_demo_halves_the_experts_and_compares(tmp_path: Path) -> None:
    report = demo(tmp_path / "run", DemoOptions(quick=True), ForwardOptions(device="cpu"))
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == [
        "data",
        "merged",
        "model",
        "pruned",
        "statistics.safetensors",
    ]
    for name in ("pruned", "merged"):
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name, output_loading_info=True)
        assert model.config.num_experts == 8
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    original, pruned, merged = report.to_json()["evaluation"]["models"]
    assert original["agreement"]["kl"] == 0
    assert 0 < merged["agreement"]["kl"] < pruned["agreement"]["kl"]
    assert original["perplexity"] < merged["perplexity"] < pruned["perplexity"]
    assert len(report.tables()) == 1
    with pytest.raises(UserError, match="exists already"):
        demo(tmp_path / "run", DemoOptions(quick=True), ForwardOptions(device="cpu"))
