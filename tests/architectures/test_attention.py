"""A config.json chooses among built-in attentions only."""

import json
import logging
from pathlib import Path

import pytest

import moetools
from moetools.architectures.attention import attention_option, with_own_attention, without_hindrances
from moetools.checkpoint.reader import open_checkpoint
from moetools.forward.streaming import ForwardOptions, StreamedModel


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("name", ["evil/kernel", "flash_attention_2", "paged|eager", 5, {"": "evil/kernel"}])
def test_foreign_names_are_dropped_and_said(key: str, name: object, caplog: pytest.LogCaptureFixture) -> None:
    config = {"a": 1, key: name, "text_config": {key: name, "b": 2}}
    with caplog.at_level(logging.WARNING, logger="moetools"):
        assert with_own_attention(config) == {"a": 1, "text_config": {"b": 2}}
    assert "not built in or not installed" in caplog.text


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_built_in_names_are_taken(name: str) -> None:
    assert with_own_attention({"_attn_implementation": name, "x": 1}) == {"attn_implementation": name, "x": 1}


def test_a_kernel_of_the_hub_is_never_asked_for(tiny, tmp_path: Path, rewrite, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetch)
    model = rewrite(tiny("mixtral"), config={"attn_implementation": "evil/kernel"})
    stock = StreamedModel(open_checkpoint(model), ForwardOptions(device="cpu")).stock.model
    assert stock.config._attn_implementation == "sdpa"
    assert attention_option(model, trust_remote_code=False) == {"attn_implementation": "eager"}
    assert attention_option(model, trust_remote_code=True) == {}
    assert attention_option(tiny("mixtral"), trust_remote_code=False) == {}
    assert json.loads((model / "config.json").read_text())["attn_implementation"] == "evil/kernel"


def test_what_keeps_stock_from_running_any_output_is_left_out(tiny, rewrite, tmp_path: Path) -> None:
    """Verified by stock transformers in its own process, which these keys of the input stop."""
    hindrances = {"return_dict": False, "quantization_config": {}, "experts_implementation": "no_such_kernel"}
    assert without_hindrances({"a": 1, "text_config": hindrances | {"b": 2}}) == {"a": 1, "text_config": {"b": 2}}
    assert without_hindrances({"return_dict": True, "quantization_config": {"quant_method": "awq"}}) == {
        "return_dict": True,
        "quantization_config": {"quant_method": "awq"},
    }
    model = rewrite(tiny("mixtral"), config=hindrances)
    assert moetools.prune_experts(model, tmp_path / "out", experts=[0, 1, 2, 3], device="cpu").verified
    assert not hindrances.keys() & json.loads((tmp_path / "out" / "config.json").read_text()).keys()


def test_outputs_by_position_are_not_asked_for(tiny, rewrite) -> None:
    model = rewrite(tiny("mixtral"), config={"return_dict": False})
    assert StreamedModel(open_checkpoint(model), ForwardOptions(device="cpu")).stock.model.config.return_dict is True
