"""distill --student of a quantized checkpoint: what is not packed trains, codes and scales stay as they are."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetools.errors import UserError
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.training.options import TrainOptions
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.distill.verb import distill
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.quantize.verb import quantize

CPU = ForwardOptions(device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (48, 24), generator=torch.Generator().manual_seed(3))}, file)
    return DataOptions(data=[f"random={file}"], seq_len=24, batch_size=8)


def heal(teacher: Path, student: Path, out: Path, data: DataOptions, part: str = "all") -> None:
    loop = TrainOptions(steps=30, train=part, train_batch_size=8, learning_rate=0.01, relative_rate=True)
    report = distill(teacher, out, StudentOptions(student=student), loop, data, CPU, Writing())
    assert report is not None
    assert report.training is not None
    trained, every = report.training.parameters
    assert 0 < trained < every


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"scheme": "w2a16"}),
        ("mixtral", {"scheme": "sub1", "bits": 1.5, "embeddings": "sub1:3"}),
        ("qwen2_moe", {"scheme": "mixed", "bits": 2.0}),
        ("gpt_oss", {"scheme": "w2a16", "format": "moetools"}),
    ],
)
@pytest.mark.parametrize("part", ["all", "router"])
def test_codes_stay_and_the_rest_heals(
    family: str, options: dict, part: str, tiny, tmp_path: Path, data: DataOptions
) -> None:
    teacher = tiny(family)
    student, out = tmp_path / "student", tmp_path / "healed"
    quantize(teacher, student, QuantizeOptions(group_size=8, **options), data, CPU, Writing())
    heal(teacher, student, out, data, part)
    before, after = load_file(student / "model.safetensors"), load_file(out / "model.safetensors")
    view = open_model(student)
    assert isinstance(view, PackedCheckpoint)
    codes = {disk for packed in view.packed.values() for disk in packed.parts.values()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in codes)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    if part == "router":
        assert all(".gate." in name or ".router." in name for name in changed)
    else:
        assert any("layernorm" in name for name in changed)
    report = evaluate([student, out], EvaluateOptions(reference=teacher), data, CPU)
    kls = [model.metrics.agreement.kl for model in report.models[1:]]  # type: ignore[union-attr]
    assert kls[1] < kls[0]


def test_packed_experts_are_not_trained(tiny, tmp_path: Path, data: DataOptions) -> None:
    student = tmp_path / "student"
    quantize(tiny("mixtral"), student, QuantizeOptions(group_size=8), data, CPU, Writing())
    with pytest.raises(UserError, match="`train=experts`: they are packed"):
        heal(tiny("mixtral"), student, tmp_path / "out", data, "experts")
    assert not (tmp_path / "out").exists()
