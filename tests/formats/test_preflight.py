"""What is known to load wrong is refused with the reason and a choice that works."""

import re
from pathlib import Path

import pytest
from mtp_models import make_mtp, mtp_tensors
from packing import EXPERTS, LINEARS, among

from moetools.architectures.base import find_architecture
from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import UserError
from moetools.formats.preflight import check
from moetools.formats.schemes import covering_patterns, find_weights, write_config
from moetools.grids.base import Grid, make_grid


def integer(bits: int, group: int | None = 8, **options: object) -> Grid:
    return make_grid({"kind": "integer", "bits": bits, "group_size": group, **options})


def run(path: Path, layout: str, choose, target: str) -> list[str]:
    source = open_checkpoint(path)
    grids = {name: grid for name in source.tensors if (grid := choose(name)) is not None}
    return check(layout, grids, source, find_architecture(source.config), target)


def two_layers(name: str) -> Grid | None:
    return integer(2 if "layers.0" in name else 4) if ".experts." in name else None


def third_scheme(name: str) -> Grid | None:
    if ".experts." in name:
        return integer(2)
    return among(("q_proj",), integer(4))(name) or among(("k_proj",), integer(8))(name)


EXPERTS_4 = among(EXPERTS, integer(4))
NVFP4, BLOCKS = make_grid({"kind": "nvfp4"}), make_grid({"kind": "float8_block"})
REFUSED = {
    "per-layer widths": ("mixtral", "pack-quantized", two_layers, "vllm", "different precision", "`format=moetools`"),
    "some experts": (
        "mixtral",
        "pack-quantized",
        lambda name: EXPERTS_4(name) if "layers.0" in name else None,
        "both",
        "stays unquantized",
        "`format=moetools`",
    ),
    "third scheme": ("mixtral", "pack-quantized", third_scheme, "vllm", "2 schemes outside", "one scheme"),
    "asymmetric": (
        "mixtral",
        "pack-quantized",
        among(EXPERTS, integer(4, symmetric=False)),
        "both",
        "zero points",
        "`target=vllm`",
    ),
    "int8 activations": (
        "mixtral",
        "int-quantized",
        among(EXPERTS, integer(8, None)),
        "transformers",
        "int8 activations",
        "`scheme=w8a16`",
    ),
    "nvfp4": ("wide", "nvfp4", among(EXPERTS, NVFP4), "transformers", "7000 times too large", "`scheme=mxfp4`"),
    "blocks": ("mixtral", "fp8", among(EXPERTS, BLOCKS), "transformers", "do not tile", "`scheme=fp8`"),
    "attention only": (
        "mixtral",
        "pack-quantized",
        among(("self_attn",), integer(4)),
        "transformers",
        "5.17 leaves the experts random",
        "w8a16",
    ),
    "fused experts": (
        "granitemoe",
        "pack-quantized",
        among(("input_linear",), integer(4)),
        "transformers",
        "all experts in one tensor",
        "`format=moetools`",
    ),
    "own format in vLLM": ("mixtral", "moetools", EXPERTS_4, "vllm", "does not read", "expand=True"),
    "two formats": ("wide", "mxfp4", among(EXPERTS, NVFP4), "vllm", "does not store nvfp4", "leave `attention`"),
    "groups": (
        "mixtral",
        "pack-quantized",
        among(EXPERTS, integer(4, 16)),
        "vllm",
        "do not divide the 24 columns",
        "`group_size=",
    ),
}


@pytest.fixture
def model(tiny):
    return lambda family: tiny("mixtral", hidden_size=64, intermediate_size=64) if family == "wide" else tiny(family)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_reason_and_way_out(case: str, model) -> None:
    family, layout, choose, target, reason, way_out = REFUSED[case]
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        run(model(family), layout, choose, target)
    assert way_out in caught.value.hint


@pytest.mark.parametrize(
    ("family", "layout", "choose", "target", "note"),
    [
        ("mixtral", "pack-quantized", EXPERTS_4, "both", None),
        ("qwen2_moe", "pack-quantized", among(LINEARS, integer(4)), "transformers", None),
        ("mixtral", "pack-quantized", among(EXPERTS, integer(4, symmetric=False)), "vllm", None),
        ("mixtral", "pack-quantized", among(EXPERTS, integer(4, None)), "vllm", "Marlin"),
        ("mixtral", "pack-quantized", among(EXPERTS, integer(4, scale_dtype="float32")), "transformers", "float32"),
        ("mixtral", "float-quantized", among(LINEARS, make_grid({"kind": "float8"})), "transformers", "activations"),
        ("mixtral", "moetools", two_layers, "transformers", "import moetools.hf"),
        ("granitemoe", "moetools", among(("input_linear",), integer(4)), "transformers", "import moetools.hf"),
        ("wide", "nvfp4", among(EXPERTS, NVFP4), "vllm", "global scale"),
    ],
)
def test_allowed(family: str, layout: str, choose, target: str, note: str | None, model) -> None:
    notes = run(model(family), layout, choose, target)
    assert [note in one for one in notes] == [True] * (note is not None)


def test_unknown_target(model) -> None:
    with pytest.raises(UserError, match="unknown target 'onnx'"):
        run(model("mixtral"), "pack-quantized", EXPERTS_4, "onnx")


def test_patterns_cover_exactly_what_is_wanted() -> None:
    experts = [f"model.layers.{layer}.mlp.experts.{e}.gate_proj" for layer in (1, 2) for e in (0, 10)]
    rest = ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.shared_experts.gate_proj", "lm_head"]
    rest += [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1, 11)]
    patterns = covering_patterns(rest, experts)
    hits = {name for name in rest + experts if any(re.match(one[3:], name) for one in patterns)}
    assert hits == set(rest)
    assert len(patterns) == 4


def test_patterns_name_layers_that_differ() -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(12)]
    patterns = covering_patterns(names[1:2], [*names[:1], *names[2:]])
    assert [name for name in names if any(re.match(one[3:], name) for one in patterns)] == names[1:2]


def test_experts_come_first_and_no_other_target_mentions_them(tiny) -> None:
    source = open_checkpoint(tiny("deepseek_v3"))
    schemes = {
        name: {"weights": {"num_bits": 2 if ".experts." in name else 4}, "input_activations": None}
        for name in source.tensors
        if name.endswith("_proj.weight")
    }
    config = write_config("pack-quantized", dict(reversed(schemes.items())), source)
    groups = list(config["config_groups"].values())
    assert [group["weights"]["num_bits"] for group in groups] == [2, 4]
    assert not any("experts" in target for target in groups[1]["targets"])
    for name, scheme in schemes.items():
        assert find_weights(config, name.removesuffix(".weight")) == scheme["weights"]
    assert {"lm_head", r"re:.*\.gate$", r"re:.*shared_expert_gate$"} <= set(config["ignore"])


@pytest.mark.parametrize("family", ["qwen3_next", "glm4_moe"])
def test_prediction_layers_may_stay_plain_beside_packed_experts(family: str, tmp_path: Path) -> None:
    """Named `mtp`, or as a layer behind the last: stock transformers does not load them."""
    path = make_mtp(family, tmp_path / "model")
    plain = mtp_tensors(path)
    run(path, "pack-quantized", lambda name: integer(8) if ".experts." in name and name not in plain else None, "both")
