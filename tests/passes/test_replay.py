"""A pass that finds its first layers finished solves nothing of them again; what follows is the same, bit by bit."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetools.checkpoint.reader import open_checkpoint
from moetools.formats.base import load_format
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.methods.distill.neurons import METHOD as NEURONS
from moetools.methods.merge.joint import METHOD as JOINT
from moetools.methods.prune.gate_mass import METHOD as GATE_MASS
from moetools.methods.quantize.gptq import METHOD as GPTQ
from moetools.passes import layer_reduction
from moetools.passes.layer_reduction import LayerReducer, ReducedLayer
from moetools.passes.quantize_ends import EndsQuantizer
from moetools.passes.quantize_layer import LayerQuantizer
from moetools.passes.quantize_pass import CalibratedLayer, QuantizePass, quantize_plan
from moetools.passes.recipes import candidate_of
from moetools.passes.stored import NOTHING_STORED, ReplayedLayer, Stored
from moetools.passes.student_layers import FitRecipe, StudentFitter
from moetools.passes.student_streams import StudentStreams
from moetools.passes.two_streams import streams_plan
from moetools.text.tokens import TokenBatch, TokenData
from moetools.verbs.distill.student_checkpoint import StudentTensors, plan_student
from moetools.verbs.quantize.plan import QuantizeOptions, make_plan

Layers = dict[int, dict[str, Tensor]]
CPU = ForwardOptions(device="cpu")
NUM_LAYERS = 4


@pytest.fixture
def data() -> TokenData:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for number in range(3):
        mask = None
        if number == 1:
            mask = torch.ones(8, 12, dtype=torch.bool)
            mask[2, 6:] = False
        ids = torch.randint(2, 128, (8, 12), generator=generator)
        batches.append(TokenBatch(input_ids=ids, attention_mask=mask, task=torch.zeros(8, dtype=torch.int64)))
    return TokenData(tasks=("t",), batches=tuple(batches), fingerprint="x", seq_len=12)


def as_stored(layers: Layers, first: int, folder: Path) -> Stored:
    """The first layers, read back from files."""
    found = {}
    for index in range(first):
        file = folder / f"{index}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in layers[index].items()}, file)
        found[index] = load_file(file)
    return found


def assert_same(one: Layers, other: Layers) -> None:
    assert sorted(one) == sorted(other) == list(range(NUM_LAYERS))
    for index, tensors in one.items():
        assert tensors.keys() == other[index].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other[index][name]), (index, name)


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """One entry per call of a function from now on."""
    calls: list[int] = []
    function = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    return calls


def reduced(path: Path, data: TokenData, stored: Stored = NOTHING_STORED) -> list[ReducedLayer]:
    checkpoint = open_checkpoint(path)
    model = StreamedModel(checkpoint, CPU)
    config = model.arch.with_expert_count(checkpoint.config, 4)
    reducer = LayerReducer(
        candidates=(candidate_of(JOINT, {"router": "fitted"}),),
        arch=model.arch,
        keep=4,
        num_groups=model.arch.num_groups(config),
        seed=0,
        statistics=None,
        protected={},
    )
    smaller = StreamedModel(checkpoint, CPU, config=config)
    plan = streams_plan(model, smaller, data, (), sample_tokens=64)
    with torch.inference_mode():
        found = list(reducer.stream_by_stream(model, smaller, data, plan, stored))
    return found


def tensors_of(layers: list[ReducedLayer]) -> Layers:
    return {layer.index: dict(layer.tensors) for layer in layers}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("first", [2, 3])
def test_a_reduction_solves_only_what_is_not_stored(
    family: str,
    first: int,
    tiny: Callable[..., Path],
    data: TokenData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tiny(family, num_hidden_layers=NUM_LAYERS)
    whole = reduced(path, data)
    solved = counted(monkeypatch, layer_reduction, "_finished")
    resumed = reduced(path, data, as_stored(tensors_of(whole), first, tmp_path))
    assert [layer.replayed for layer in resumed] == [index < first for index in range(NUM_LAYERS)]
    assert len(solved) == NUM_LAYERS - first
    assert_same(tensors_of(whole), tensors_of(resumed))


def test_a_reduction_whose_layers_are_all_stored_runs_no_text(
    tiny: Callable[..., Path], data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("mixtral", num_hidden_layers=NUM_LAYERS)
    whole = reduced(path, data)
    runs = counted(monkeypatch, StreamedModel, "run_layer")
    assert_same(tensors_of(whole), tensors_of(reduced(path, data, as_stored(tensors_of(whole), NUM_LAYERS, tmp_path))))
    assert not runs


def test_a_reduction_without_streams_hands_stored_layers_over(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = StreamedModel(open_checkpoint(tiny("mixtral", num_hidden_layers=NUM_LAYERS)), CPU)
    reducer = LayerReducer(
        candidates=(candidate_of(GATE_MASS, {}),),
        arch=model.arch,
        keep=4,
        num_groups=1,
        seed=0,
        statistics=None,
        protected={},
    )
    kept = {index: {"a": torch.full((2,), float(index))} for index in range(NUM_LAYERS)}
    with torch.inference_mode():
        found = list(reducer.layer_by_layer(model, as_stored(kept, NUM_LAYERS, tmp_path)))
    assert all(layer.replayed for layer in found)
    assert_same(kept, tensors_of(found))


def student(
    path: Path, data: TokenData, kept: list[int], warm_start: bool, stored: Stored = NOTHING_STORED
) -> tuple[Layers, list[int], Tensor]:
    """The student's layers, those that were fitted (by the teacher's index), and its last hidden states."""
    teacher = StreamedModel(open_checkpoint(path), CPU)
    plan = plan_student(teacher, kept, 48)
    recipe = FitRecipe(init=NEURONS, warm_start=warm_start, local_steps=3 if warm_start else 0)
    fitter = StudentFitter(recipe, width=48, top_k=2)
    found: Layers = {}
    fitted: list[int] = []
    with torch.no_grad():
        new = StreamedModel(open_checkpoint(path), CPU, config=dict(plan.config))
        memory = streams_plan(teacher, new, data, NEURONS.needs, sample_tokens=64)
        streams = StudentStreams(teacher, data, kept, NEURONS.needs, memory, stored)
        tensors = StudentTensors(teacher, new, plan, streams.block)
        for layer in streams.layers():
            if isinstance(layer, ReplayedLayer):
                found[layer.index] = dict(layer.tensors)
                continue
            ffn, _ = fitter.fit(layer, tensors.dtype(layer))
            layer.finish(ffn)
            fitted.append(layer.index)
            found[tensors.place(layer)] = tensors.in_module(layer, ffn)
    return found, fitted, torch.stack([streams.last_hidden(number) for number in range(3)])


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("warm_start", [True, False])
def test_a_student_fits_only_what_is_not_stored(
    family: str, warm_start: bool, tiny: Callable[..., Path], data: TokenData, tmp_path: Path
) -> None:
    """Its layers are numbered in the student, which lacks one of the teacher's."""
    path, kept = tiny(family, num_hidden_layers=NUM_LAYERS + 1), [0, 1, 3, 4]
    whole, fitted, last = student(path, data, kept, warm_start)
    assert fitted == kept
    resumed, fitted, same = student(path, data, kept, warm_start, as_stored(whole, 3, tmp_path))
    assert fitted == [4]
    assert_same(whole, resumed)
    assert torch.equal(last, same)


def test_a_stored_layer_of_a_student_is_used_as_it_is(tiny: Callable[..., Path], data: TokenData) -> None:
    """Down projections of zeros: the student's stream is what the layers give without their FFN."""
    path = tiny("mixtral", num_hidden_layers=2)
    shapes = {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}
    nothing = {f"mlp.{name}_proj.weight": torch.zeros(shape) for name, shape in shapes.items()}
    _, fitted, last = student(path, data, [0, 1], warm_start=True, stored={0: nothing, 1: nothing})
    assert not fitted
    model = StreamedModel(open_checkpoint(path), CPU)
    with torch.inference_mode():
        hidden = model.skeleton.enter(data.batches[0])[0]
        for layer in model.layers():
            layer.module.mlp.experts.down_proj.zero_()
            hidden = model.run_layer(layer, data.batches[0], hidden)
    assert torch.allclose(hidden, last[0], atol=1e-5)


def quantized(
    path: Path, data: TokenData | None, stored: Stored = NOTHING_STORED, ends_stored: Mapping[str, Tensor] | None = None
) -> tuple[Layers, dict[str, Tensor], list[int]]:
    """Layers, embeddings and head, and the layers that were calibrated."""
    model = StreamedModel(open_checkpoint(path), CPU)
    plan = make_plan(model, QuantizeOptions(group_size=8, embeddings="w4a16"))
    quantizer = LayerQuantizer(model.stock, GPTQ, load_format("moetools"), plan.grids, 10**7)
    ends = EndsQuantizer(quantizer, (model,), plan.places[None], ends_stored)
    run = QuantizePass(model, data, quantize_plan(model, data), stored, to_end=ends.has_head)
    found: Layers = {}
    calibrated: list[int] = []
    with torch.inference_mode():
        ends.embeddings()
        for layer in run.layers():
            if isinstance(layer, CalibratedLayer):
                calibrated.append(layer.index)
                found[layer.index] = quantizer.quantize(layer, plan.places[layer.index]).native
            else:
                found[layer.index] = dict(layer.tensors)
            if layer.index + 1 == model.num_layers and ends.has_head:
                ends.head(run.behind())
    return found, ends.result.native, calibrated


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("first", [2, NUM_LAYERS])
def test_quantization_solves_only_what_is_not_stored(
    family: str, first: int, tiny: Callable[..., Path], data: TokenData, tmp_path: Path
) -> None:
    """Where all layers are stored and the rest is not, the head still sees what the quantized layers give."""
    path = tiny(family, num_hidden_layers=NUM_LAYERS)
    whole, ends, calibrated = quantized(path, data)
    assert calibrated == list(range(NUM_LAYERS))
    assert len(ends) == 2
    resumed, same, calibrated = quantized(path, data, as_stored(whole, first, tmp_path))
    assert calibrated == list(range(first, NUM_LAYERS))
    assert_same(whole, resumed)
    assert all(torch.equal(ends[name], same[name]) for name in ends)


def test_quantization_whose_units_are_all_stored_solves_nothing_and_runs_no_text(
    tiny: Callable[..., Path], data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("mixtral", num_hidden_layers=NUM_LAYERS)
    whole, ends, _ = quantized(path, data)
    runs, solved = counted(monkeypatch, StreamedModel, "run_layer"), counted(monkeypatch, LayerQuantizer, "solve")
    resumed, same, calibrated = quantized(path, data, as_stored(whole, NUM_LAYERS, tmp_path), ends)
    assert not runs
    assert not solved
    assert not calibrated
    assert_same(whole, resumed)
    assert all(torch.equal(ends[name], same[name]) for name in ends)
