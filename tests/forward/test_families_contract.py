"""The contract of every family; a dozen of them unless MOETOOLS_ALL_FAMILIES is set."""

import os
import re

import pytest
from families import CANNOT_CHANGE, CANNOT_MAKE, CANNOT_RUN
from families_contract import check_distill, check_evaluate, check_prune, make_shrunk, outcome
from tiny_configs import families

from moetools.architectures.base import find_architecture
from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import UnsupportedModelError

QUICK = (
    "afmoe", "deepseek_v4", "gemma4_text", "granitemoehybrid", "hunyuan_v1_moe", "jamba", "lfm2_moe", "llama4_text",
    "nemotron_h", "nllb-moe", "qwen3_next", "qwen3_vl_moe", "switch_transformers", "zaya",
)  # fmt: skip
"""Every kind of router, state-space and convolution layers, streams, a wrapper, two stacks, three kinds of refusal."""
EVERY = [family for family in families() if family not in CANNOT_MAKE]
CHOSEN = EVERY if os.environ.get("MOETOOLS_ALL_FAMILIES") else QUICK


def expected(found: str, pattern: str | None) -> bool:
    return found == "works" if pattern is None else re.match(f"refused: .*{pattern}", found) is not None


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("family", CHOSEN)
def test_a_family_works_or_is_refused_with_a_reason(family, tmp_path):
    path = make_shrunk(family, tmp_path / "model")
    ran, pruned = outcome(check_evaluate, path), outcome(check_prune, path)
    assert expected(ran, CANNOT_RUN.get(family)), ran
    assert expected(pruned, {**CANNOT_RUN, **CANNOT_CHANGE}.get(family)), pruned


@pytest.mark.parametrize("family", ["exaone_moe", "kimi_k25", "mimo_v2_flash", "qwen3_vl_moe"])
def test_a_family_that_can_be_dense_by_its_own_config_is_distilled_to_that(family, tmp_path):
    path = make_shrunk(family, tmp_path / "model")
    arch = find_architecture(open_checkpoint(path).config)
    assert arch.dense is not None
    assert arch.dense.own_keys
    assert check_distill(path) is None


def test_a_family_whose_attention_depends_on_the_ffn_has_no_dense_counterpart(tmp_path):
    path = make_shrunk("cohere2_moe", tmp_path / "model")
    assert find_architecture(open_checkpoint(path).config).dense is None
    with pytest.raises(UnsupportedModelError, match="no dense counterpart"):
        check_distill(path)
