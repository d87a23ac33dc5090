"""Patterns of a hostile quantization_config are refused before they are matched."""

import time

import pytest

from moetools.errors import CheckpointError
from moetools.formats.schemes import find_weights

GROUP = {"weights": {"num_bits": 4}}


def config(*targets: str) -> dict:
    other = {"targets": ["re:nothing"], "weights": {"num_bits": 8}}
    return {"config_groups": {"a": other, "b": {"targets": list(targets), **GROUP}}}


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*,)*x", ".*.*.*.*.*.*x", "(", "[a", "a{2,1}", "(?P<n", "x" * 2000, "(a|aa){1,99}b"]
)
def test_patterns_that_could_take_for_ever_are_refused(pattern: str) -> None:
    began = time.process_time()
    with pytest.raises(CheckpointError, match="quantization_config: "):
        find_weights(config(f"re:{pattern}"), "a" * 200)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "pattern",
    [r".*self_attn\.(q|k|v|o)_proj$", r"(^|.*\.)self_attn\.q_proj$", r".*layers\.[0-9]+\.(.*\.)?q_proj", r".*attn.*"],
)
def test_patterns_that_are_in_use_are_matched(pattern: str) -> None:
    assert find_weights(config(f"re:{pattern}"), "model.layers.3.self_attn.q_proj") == GROUP["weights"]
