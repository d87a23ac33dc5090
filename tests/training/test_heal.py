import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from families import stock_logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moetools.architectures.weights import LayerWeights
from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import DataError, UserError
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.forward.tokens import TokenBatch, TokenData, pad_right
from moetools.training import heal
from moetools.training.divergence import kl_divergence
from moetools.training.experts import use_trainable_experts
from moetools.training.heal import HealResult, heal_routers, learning_rate_factor

FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss"]
"""Softmax renormalised; sigmoid with correction bias, groups and shared experts; top-k then softmax with biases."""
CPU = ForwardOptions(device="cpu", dtype="float32")


def token_data(sequences: int = 20, length: int = 24, *, padded: bool = False) -> TokenData:
    generator = torch.Generator().manual_seed(5)
    lengths = [length - (3 * row % 11 if padded else 0) for row in range(sequences)]
    ids, mask = pad_right([torch.randint(2, 128, (n,), generator=generator) for n in lengths], 1)
    batch = TokenBatch(input_ids=ids, attention_mask=mask, task=torch.zeros(sequences, dtype=torch.long))
    return TokenData(tasks=("only",), batches=(batch,), fingerprint="x", seq_len=length)


def damage(model: Path, out: Path, *, parts: tuple[str, ...] = ("gate.weight", "router.weight")) -> Path:
    """A copy of a one-file checkpoint whose routers (or other named tensors) have turned into noise."""
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if any(part in name for part in parts):
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            tensors[name] = (tensor + noise).to(tensor.dtype)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((model / "config.json").read_bytes())
    return out


def healed(
    teacher: Path, student: Path, data: TokenData, forward: ForwardOptions = CPU, **options: object
) -> HealResult:
    arguments: dict = {"steps": 20, "batch_size": 6} | options
    return heal_routers(open_checkpoint(teacher), open_checkpoint(student), data, forward, **arguments)


def written(result: HealResult, student: Path, out: Path) -> Path:
    """The student's checkpoint with the healed fields, as the verbs would write it."""
    model = StreamedModel(open_checkpoint(student), CPU)
    tensors = load_file(student / "model.safetensors")
    for layer in model.layers(keep_native=True, fill=False):
        if layer.index in result.routers:
            fields = {**result.routers[layer.index], **result.experts.get(layer.index, {})}
            weights = dataclasses.replace(model.weights(layer), **fields)
            tensors |= model.stock.disk_tensors(layer.index, layer.native, weights)
    out.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((student / "config.json").read_bytes())
    return out


def mean_kl(teacher: Path, student: Path, data: TokenData) -> float:
    """By hand, with stock transformers, in fp64."""
    (batch,) = data.batches
    mask = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask
    p, q = (
        stock_logits(path, batch.input_ids, mask.long())[mask].double().log_softmax(-1) for path in (teacher, student)
    )
    return (p.exp() * (p - q)).sum(-1).mean().item()


def original_fields(path: Path) -> dict[int, LayerWeights]:
    model = StreamedModel(open_checkpoint(path), CPU)
    found = {}
    for layer in model.layers(keep_native=True, fill=False):
        if layer.index in model.stock.moe_layers:
            found[layer.index] = model.weights(layer)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_heal_and_nothing_else_changes(tiny, tmp_path, family):
    teacher, data = tiny(family), token_data(padded=True)
    student = damage(teacher, tmp_path / "student")
    result = healed(teacher, student, data, steps=40)
    assert min(kl for _, kl in result.curve) < 0.85 * result.curve[0][1]
    assert result.best_step > 0
    assert result.experts == {}
    out = written(result, student, tmp_path / "healed")
    assert mean_kl(teacher, out, data) < 0.9 * mean_kl(teacher, student, data)
    before, after = load_file(student / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".gate.weight" in name or ".router." in name for name in changed)
    for index, weights in original_fields(student).items():
        router = result.routers[index]
        assert set(router) == set(weights.tensors()) & set(LayerWeights.ROUTER_FIELDS)
        assert all(router[name].dtype == weights.tensors()[name].dtype for name in router)
        if weights.correction_bias_E is not None:
            torch.testing.assert_close(router["correction_bias_E"], weights.correction_bias_E, rtol=0, atol=0)


def test_curve_is_the_kl_of_the_checkpoint_on_held_out_sequences(tiny, tmp_path):
    teacher, data = tiny("mixtral"), token_data(padded=True)
    student = damage(teacher, tmp_path / "student")
    result = healed(teacher, student, data)
    batch = data.batches[0]
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()[:2]
    held = TokenBatch(input_ids=batch.input_ids[rows], attention_mask=batch.attention_mask[rows], task=batch.task[rows])
    held_data = dataclasses.replace(data, batches=(held,))
    assert result.curve[0][1] == pytest.approx(mean_kl(teacher, student, held_data), rel=2e-3)
    out = written(result, student, tmp_path / "healed")
    assert dict(result.curve)[result.best_step] == pytest.approx(mean_kl(teacher, out, held_data), rel=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_heal_further(tiny, tmp_path, family):
    teacher, data = tiny(family), token_data()
    student = damage(teacher, tmp_path / "student", parts=("w2.weight", "down_proj", "gate.weight", "router.weight"))
    routers = healed(teacher, student, data)
    both = healed(teacher, student, data, train="router+experts")
    assert min(kl for _, kl in both.curve) < min(kl for _, kl in routers.curve)
    for index, weights in original_fields(student).items():
        fields = {**both.routers[index], **both.experts[index]}
        assert {name: (t.shape, t.dtype) for name, t in fields.items()} == {
            name: (t.shape, t.dtype) for name, t in weights.tensors().items()
        }
    out = written(both, student, tmp_path / "healed")
    assert mean_kl(teacher, out, data) < mean_kl(teacher, written(routers, student, tmp_path / "routers"), data)


def test_never_worse_than_the_start(tiny, tmp_path):
    teacher, data = tiny("mixtral"), token_data()
    student = damage(teacher, tmp_path / "student")
    result = healed(teacher, student, data, learning_rate=1e3, steps=5)
    best = dict(result.curve)[result.best_step]
    assert best == min(kl for _, kl in result.curve)
    assert best <= result.curve[0][1]
    same = healed(teacher, teacher, data, steps=5)
    assert same.curve[0][1] == pytest.approx(0, abs=1e-5)
    for index, weights in original_fields(teacher).items():
        torch.testing.assert_close(same.routers[index]["router_ED"], weights.router_ED, rtol=0, atol=0)


def test_seeds_reproduce(tiny, tmp_path):
    teacher, data = tiny("mixtral"), token_data()
    student = damage(teacher, tmp_path / "student")
    first, again, other = (healed(teacher, student, data, steps=6, seed=seed) for seed in (1, 1, 2))
    assert first.curve == again.curve
    assert first.curve != other.curve
    for index, router in first.routers.items():
        assert torch.equal(router["router_ED"], again.routers[index]["router_ED"])


def test_budget_decides_on_cache_and_micro_batches_and_is_refused_below_them(tiny, tmp_path):
    teacher, data = tiny("mixtral"), token_data()
    student = damage(teacher, tmp_path / "student")
    models = StreamedModel(open_checkpoint(teacher), CPU), StreamedModel(open_checkpoint(student), CPU)
    schedule = heal._schedule(data, 6, 6, 0)
    plan = heal.plan_memory(*models, schedule, "router", 6)
    free = healed(teacher, student, data, steps=6)
    assert free.cached
    # A cache larger than the teacher: a budget between the two ways makes the teacher run beside every step.
    plan = dataclasses.replace(plan, cache=10 * plan.teacher)
    together = plan.teacher + plan.student + plan.training + plan.row
    assert not dataclasses.replace(plan, budget=together).cached
    assert dataclasses.replace(plan, budget=together).rows == 1
    dataclasses.replace(plan, budget=together).check()
    with pytest.raises(UserError, match=r"memory budget .* too small to heal: teacher .* need .* together"):
        dataclasses.replace(plan, budget=together - 1).check()
    with pytest.raises(UserError, match="too small to heal"):
        healed(teacher, student, data, dataclasses.replace(CPU, memory_budget=100_000))


def test_teacher_beside_every_step_and_micro_batches_give_the_same_routers(tiny, tmp_path, monkeypatch):
    teacher, data = tiny("mixtral", dtype=torch.float32), token_data(padded=True)
    student = damage(teacher, tmp_path / "student")
    whole = healed(teacher, student, data, steps=4)
    monkeypatch.setattr(heal.HealMemory, "cached", property(lambda self: False))
    monkeypatch.setattr(heal.HealMemory, "rows", property(lambda self: 2))
    parts = healed(teacher, student, data, steps=4)
    assert not parts.cached
    for (step, kl), (other_step, other) in zip(whole.curve, parts.curve, strict=True):
        assert step == other_step
        assert kl == pytest.approx(other, rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_last_good(tiny, tmp_path, monkeypatch):
    teacher, data = tiny("mixtral"), token_data()
    student = damage(teacher, tmp_path / "student")
    calls = []

    def breaking(*args: Tensor, **options: float) -> Tensor:
        value = kl_divergence(*args, **options)
        calls.append(value.requires_grad)
        return value * math.nan if sum(calls) > 3 and value.requires_grad else value

    monkeypatch.setattr(heal, "kl_divergence", breaking)
    result = healed(teacher, student, data, steps=10)
    assert result.steps == 3
    assert result.curve[-1][0] == 3
    assert all(router["router_ED"].isfinite().all() for router in result.routers.values())


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"temperature": math.nan}]
)
def test_refuses_bad_options(tiny, options):
    with pytest.raises(UserError, match=next(iter(options)).replace("_", " ")):
        healed(tiny("mixtral"), tiny("mixtral"), token_data(), **options)


def test_refuses_other_vocabularies_and_too_little_text(tiny):
    with pytest.raises(UserError, match="cannot be compared"):
        healed(tiny("mixtral"), tiny("mixtral", vocab_size=96), token_data())
    with pytest.raises(DataError, match="at least 2 sequences, 1 given"):
        healed(tiny("mixtral"), tiny("mixtral"), token_data(1))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_and_its_gradient_against_autograd(temperature, monkeypatch):
    monkeypatch.setattr("moetools.training.divergence._CHUNK_ELEMENTS", 100)
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(9, 40, generator=generator)
    student = (3 * torch.randn(9, 40, generator=generator)).requires_grad_(True)
    weights = torch.rand(9, generator=generator)
    value = kl_divergence(teacher, student, temperature=temperature)
    (grad,) = torch.autograd.grad((value * weights).sum(), student)
    p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    expected = temperature**2 * (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, torch.autograd.grad((expected * weights).sum(), student)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2_moe"])
def test_experts_and_their_gradients_equal_stock(tiny, family):
    ids = token_data(3).batches[0].input_ids
    found = []
    for ours in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
        model.set_experts_implementation("eager")
        if ours:
            use_trainable_experts(model)
        logits = model(input_ids=ids, use_cache=False).logits
        logits.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if "experts." in n or "gate.weight" in n}
        found.append((logits.detach(), grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][name], rtol=1e-3, atol=1e-6)


def test_learning_rate_warms_up_and_falls():
    factors = [learning_rate_factor(step, 100) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert all(a > b for a, b in pairwise(factors[9:]))
    assert 0 < factors[-1] < 0.001
