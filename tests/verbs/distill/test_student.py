"""A dense student from a folder on disk to a verified folder on disk."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetools.errors import UnsupportedModelError, UserError, VerificationError
from moetools.passes.student_layers import kept_layers
from moetools.pipeline.options import Writing
from moetools.plugins import plugin_names
from moetools.text.options import DataOptions
from moetools.training.options import TrainOptions
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.distill.report import StudentReport
from moetools.verbs.distill.verb import distill
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate
from tests.families import FAMILIES
from tests.verbs.reduce.reducing import CPU
from tests.verbs.reduce.test_compress import STOCK_CHECK

DENSE = {
    "mixtral": "mistral",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen3",
    "granitemoe": "granite",
    "dots1": "qwen3",
    "ernie4_5_moe": "ernie4_5",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "glm4_moe": "glm4_moe",
}
ONE_EXPERT = ["olmoe", "gpt_oss", "minimax_m2"]
NEITHER = ["phimoe", "flex_olmo"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (28, 16), generator=torch.Generator().manual_seed(3))}, file)
    return DataOptions(data=[f"random={file}"], seq_len=16, batch_size=4)


def make(teacher: Path, out: Path, data: DataOptions, **options: Any) -> StudentReport:
    asked = StudentOptions(**{"local_steps": 0, **options})
    report = distill(teacher, out, asked, TrainOptions(), data, CPU, Writing(), command="moetools test")
    assert report is not None
    assert report.made is not None
    return report.made


def test_families_are_all_spoken_for() -> None:
    assert sorted([*DENSE, *ONE_EXPERT, *NEITHER]) == sorted(FAMILIES)


@pytest.fixture(scope="module")
def students(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, data: DataOptions) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    for family in [*DENSE, *ONE_EXPERT]:
        make(tiny(family), folder / family, data, width=100)
    return {family: folder / family for family in [*DENSE, *ONE_EXPERT]}


def test_every_student_loads_in_stock_transformers_without_moetools(students: dict[str, Path], tmp_path: Path) -> None:
    ids = torch.randint(2, 128, (2, 12), generator=torch.Generator().manual_seed(4))
    check = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STOCK_CHECK, json.dumps(ids.tolist()), *map(str, students.values())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert check.returncode == 0, check.stderr
    assert check.stdout.count(" good ") == len(students), check.stdout


def test_dense_students_have_no_experts(students: dict[str, Path], stock: Callable[..., Any]) -> None:
    for family, model_type in DENSE.items():
        assert json.loads((students[family] / "config.json").read_text())["model_type"] == model_type
        model = stock(students[family])
        assert not [name for name, _ in model.named_modules() if "expert" in name or "router" in name], family
        assert {layer.mlp.down_proj.weight.shape[1] for layer in model.model.layers} == {100}


def test_students_without_a_dense_family_have_one_expert(students: dict[str, Path], stock: Callable[..., Any]) -> None:
    for family in ONE_EXPERT:
        model = stock(students[family])
        assert {module.num_experts for name, module in model.named_modules() if name.endswith("experts")} == {1}
        assert json.loads((students[family] / "moetools.json").read_text())["warning"]


@pytest.mark.parametrize("family", list(DENSE))
def test_everything_but_the_ffn_is_the_teachers(
    family: str, students: dict[str, Path], tiny: Callable[..., Path], stock: Callable[..., Any]
) -> None:
    """With all FFNs silenced, teacher and student compute the same logits, bit for bit."""
    ids, logits = torch.randint(2, 128, (2, 14), generator=torch.Generator().manual_seed(4)), []
    for path in (tiny(family), students[family]):
        model, handles = stock(path), []
        for layer in model.model.layers:
            block = getattr(layer, "block_sparse_moe", None) or layer.mlp
            handles.append(block.register_forward_hook(lambda _block, args, _output: torch.zeros_like(args[0])))
        with torch.no_grad():
            logits.append(model(ids, use_cache=False).logits)
        for handle in handles:
            handle.remove()
    assert torch.equal(*logits)


def test_config_has_both_spellings(students: dict[str, Path]) -> None:
    config = json.loads((students["mixtral"] / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["dtype"] == config["torch_dtype"]
    assert config["sliding_window"] is None  # Mistral's own default is 4096
    assert not [key for key in config if "expert" in key or "router" in key]


@pytest.mark.parametrize("family", NEITHER)
def test_families_that_cannot_be_dense_are_refused(
    family: str, tiny: Callable[..., Path], tmp_path: Path, data: DataOptions
) -> None:
    with pytest.raises(UnsupportedModelError):
        make(tiny(family), tmp_path / "out", data)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", plugin_names("moetools.methods.distill"))
def test_every_initialisation_makes_a_student(
    init: str, tiny: Callable[..., Path], tmp_path: Path, data: DataOptions
) -> None:
    report = make(tiny("qwen2_moe"), tmp_path / "out", data, init=init, width=110)
    assert all(0 <= fit.error <= fit.error_init + 1e-3 for fit in report.fits)
    assert report.verified


def test_an_expert_that_is_everything_is_kept_exactly(
    tiny: Callable[..., Path], rewrite: Callable[..., Path], tmp_path: Path, data: DataOptions
) -> None:
    """All experts alike: the MoE layer is one dense FFN, which every way to choose and refit must find."""

    def alike(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in tensors:
            if ".experts." in name:
                first = name.split(".experts.")[0] + ".experts.0." + name.split(".experts.")[1].split(".", 1)[1]
                tensors[name] = tensors[first].clone()
        return tensors

    teacher = rewrite(tiny("mixtral", dtype=torch.float32), alike)
    for init, warm in (("mean", False), ("frequency-average", False), ("cp", True), ("aligned-average", True)):
        report = make(teacher, tmp_path / init, data, init=init, width=24, warm_start=warm)
        assert max(fit.error for fit in report.fits) < 1e-3, init
        found = evaluate([tmp_path / init], EvaluateOptions(reference=teacher), data, CPU).models[1].metrics.agreement
        assert found is not None
        assert found.kl < 1e-6


def test_the_warm_start_and_local_steps_each_bring_the_student_closer(
    tiny: Callable[..., Path], tmp_path: Path, data: DataOptions
) -> None:
    settings: dict[str, dict[str, Any]] = {
        "start": {"init": "do-acp", "warm_start": False},
        "refit": {"init": "do-acp"},
        "steps": {"init": "do-acp", "local_steps": 60},
    }
    error = {name: make(tiny("mixtral"), tmp_path / name, data, **chosen).fits for name, chosen in settings.items()}
    for layer in range(3):
        assert error["refit"][layer].error <= error["start"][layer].error + 1e-3
        assert error["steps"][layer].error <= error["refit"][layer].error + 1e-2
    assert error["refit"][0].error < error["start"][0].error


def test_fewer_layers(tiny: Callable[..., Path], tmp_path: Path, data: DataOptions, stock: Callable[..., Any]) -> None:
    report = make(tiny("mixtral"), tmp_path / "out", data, layers=2)
    assert report.layers == (3, 2)
    assert [fit.layer for fit in report.fits] == [0, 2]
    teacher, student = stock(tiny("mixtral")), stock(tmp_path / "out")
    assert len(student.model.layers) == 2
    kept = teacher.model.layers[2].self_attn.q_proj.weight
    assert torch.equal(student.model.layers[1].self_attn.q_proj.weight, kept)


def test_kept_layers_are_evenly_spaced() -> None:
    assert list(kept_layers(12, 4)) == [0, 4, 7, 11]
    assert list(kept_layers(3, 1)) == [0]
    with pytest.raises(UserError, match="between 1 and"):
        kept_layers(3, 4)


def test_a_dense_layer_of_the_teacher_keeps_its_function(
    tiny: Callable[..., Path], tmp_path: Path, data: DataOptions, stock: Callable[..., Any]
) -> None:
    """Wider than before: its neurons are still there, and the added ones add nothing."""
    teacher = tiny("deepseek_v3")
    make(teacher, tmp_path / "out", data, init="cp", warm_start=False, width=100)
    wide, narrow = (stock(path).model.layers[0].mlp for path in (tmp_path / "out", teacher))
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(wide(hidden), narrow(hidden), atol=1e-6)


def test_the_same_run_gives_the_same_bytes(tiny: Callable[..., Path], tmp_path: Path, data: DataOptions) -> None:
    for name in ("one", "other"):
        make(tiny("mixtral"), tmp_path / name, data, local_steps=5)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bad_input_is_refused_before_anything_is_written(
    tiny: Callable[..., Path], students: dict[str, Path], tmp_path: Path, data: DataOptions
) -> None:
    bad: list[tuple[Path, dict[str, Any], str]] = [
        (students["mixtral"], {}, "dense already"),
        (students["deepseek_v3"], {}, "dense already"),
        (tiny("mixtral"), {"init": "neurons", "warm_start": False}, "chooses neurons"),
        (tiny("mixtral"), {"warm_start": False, "init": "cp", "local_steps": 5}, "belong to the warm start"),
        (tiny("mixtral"), {"init": "nothing"}, "unknown initialisation"),
        (tiny("mixtral"), {"width": 0}, "below 1"),
        (tiny("mixtral"), {"width": 8 * 24 + 1}, "more than the 192"),
        (tiny("qwen2_moe"), {"width": 40}, "no neuron beside the 40"),
        (tiny("mixtral"), {"scaling": "none"}, "unknown; legal"),
        (tiny("mixtral"), {"layers": 9}, "between 1 and"),
    ]
    for teacher, options, message in bad:
        with pytest.raises(UserError, match=message):
            make(teacher, tmp_path / "out", data, **options)
    with pytest.raises(UserError, match="needs text"):
        make(tiny("mixtral"), tmp_path / "out", DataOptions())
    assert not list(tmp_path.iterdir())


def test_a_student_family_that_computes_something_else_is_caught(
    tiny: Callable[..., Path], tmp_path: Path, data: DataOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "moetools.verbs.distill.student_checkpoint.effective_config", lambda *_: {"rms_norm_eps": 0.5, "head_dim": 8}
    )
    with pytest.raises(VerificationError, match="does not compute"):
        make(tiny("mixtral"), tmp_path / "out", data)
    assert not (tmp_path / "out").exists()
