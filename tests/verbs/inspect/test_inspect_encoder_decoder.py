"""inspect of encoder-decoder models against transformers' own modules; what else is asked of them is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import ENCODER_DECODERS
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from moetools.architectures.base import find_architecture
from moetools.errors import CheckpointError, UnsupportedModelError
from moetools.verbs.inspect.verb import inspect

_SIZES = {
    "switch_transformers": {"d_kv": 8, "d_ff": 48, "num_layers": 4, "num_decoder_layers": 6, "num_heads": 4}
    | {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 3},
    "nllb_moe": {"encoder_layers": 4, "decoder_layers": 6, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    | {"encoder_sparse_step": 2, "decoder_sparse_step": 2}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
}


@pytest.fixture(params=sorted(ENCODER_DECODERS))
def saved(request: Any, tmp_path: Path) -> tuple[Path, Any]:
    sizes = {"vocab_size": 64, "d_model": 32, "num_experts": 8, **_SIZES[request.param]}
    name = "nllb-moe" if request.param == "nllb_moe" else request.param
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, **sizes))
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_both_stacks_are_counted(saved: tuple[Path, Any]) -> None:
    path, model = saved
    summary = inspect(path)
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    routers = [module for name, module in model.named_modules() if name.endswith(".router")]
    count = {"experts": experts, "router": routers}
    assert summary.layers == 10
    assert summary.moe_layers == (1, 3, 5, 7, 9)
    assert summary.parameters == model.num_parameters()
    assert (summary.experts, summary.expert_width, summary.hidden_size) == (8, 48, 32)
    assert summary.top_k == {"switch_transformers": 1, "nllb-moe": 2}[summary.model_type]
    for part, modules in count.items():
        stock = sum(tensor.numel() for module in modules for tensor in module.parameters())
        assert summary.parts[part].parameters == stock
    assert "other" not in summary.parts


def test_a_wrong_number_of_layers_is_refused(saved: tuple[Path, Any]) -> None:
    path, _ = saved
    config = json.loads((path / "config.json").read_text())
    key = "num_decoder_layers" if "num_decoder_layers" in config else "decoder_layers"
    (path / "config.json").write_text(json.dumps({**config, key: 7}))
    with pytest.raises(CheckpointError, match=f"{key} 11, but 10 layers are on disk; layer 10 is not"):
        inspect(path)


def test_verbs_that_change_experts_refuse_it_by_its_kind(saved: tuple[Path, Any]) -> None:
    config = json.loads((saved[0] / "config.json").read_text())
    with pytest.raises(
        UnsupportedModelError,
        match=r"encoder-decoder model, which can only be inspected and evaluated|can only be inspected: transformers",
    ):
        find_architecture(config)
