"""The two-stream pass against a model run whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import StatisticsError
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.methods.base import ExpertDecision, combine_experts
from moetools.methods.joint_refit import RIDGES
from moetools.passes.layer_reduction import _solved_for_members, _wide
from moetools.passes.sequential import SequentialLayer, SequentialPass
from moetools.passes.two_streams import streams_plan
from moetools.text.tokens import TokenBatch, TokenData

FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "minimax_m2", "ernie4_5_moe"]


def tokens(padded: bool = False, sequences: int = 4) -> TokenData:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for number in range(3):
        mask = None
        if padded and number == 1:
            mask = torch.ones(sequences, 10, dtype=torch.bool)
            mask[2, 6:] = False
        ids = torch.randint(2, 128, (sequences, 10), generator=generator)
        task = torch.zeros(sequences, dtype=torch.int64)
        batches.append(TokenBatch(input_ids=ids, attention_mask=mask, task=task))
    return TokenData(tasks=("t",), batches=tuple(batches), fingerprint="x", seq_len=10)


def models(path: Path, keep: int = 8) -> tuple[StreamedModel, StreamedModel]:
    options = ForwardOptions(device="cpu")
    checkpoint = open_checkpoint(path)
    original = StreamedModel(checkpoint, options)
    config = original.arch.with_expert_count(checkpoint.config, keep)
    return original, StreamedModel(checkpoint, options, config=config)


def streams(path: Path, data: TokenData, change: Callable[[SequentialLayer], LayerWeights]) -> SequentialPass:
    original, smaller = models(path)
    run = SequentialPass(original, smaller, data, (), streams_plan(original, smaller, data, (), sample_tokens=64))
    with torch.inference_mode():
        for layer in run.layers():
            if isinstance(layer, SequentialLayer):
                layer.finish(change(layer))
    return run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_unchanged_weights_keep_both_streams_together(family: str, padded: bool, tiny: Callable[..., Path]) -> None:
    data = tokens(padded)
    run = streams(tiny(family), data, lambda layer: layer.weights)
    for number, batch in enumerate(data.batches):
        real = slice(None) if batch.attention_mask is None else batch.attention_mask
        assert torch.allclose(run.before[number][real], run.after[number][real], atol=1e-4)


def test_the_compressed_stream_is_the_compressed_model(tiny: Callable[..., Path]) -> None:
    """Zeroed down projections: the block adds nothing, which can be computed without the pass."""
    data, path = tokens(), tiny("mixtral")

    def zeroed(layer: SequentialLayer) -> LayerWeights:
        weights = layer.weights
        return LayerWeights(**{**weights.tensors(), "down_EDF": torch.zeros_like(weights.down_EDF)})

    run = streams(path, data, zeroed)
    model = StreamedModel(open_checkpoint(path), ForwardOptions(device="cpu"))
    with torch.inference_mode():
        hidden = model.skeleton.enter(data.batches[0])[0]
        for layer in model.layers():
            layer.module.mlp.experts.down_proj.zero_()
            hidden = model.run_layer(layer, data.batches[0], hidden)
    assert torch.allclose(hidden, run.after[0], atol=1e-5)


def dense_features(layer: SequentialLayer, hidden_TD: Tensor, model: StreamedModel) -> tuple[Tensor, Tensor]:
    """[T, E * F] gated intermediates and [T, E] routing weights of a Mixtral layer, without any of our code."""
    weights = layer.weights
    probability = (hidden_TD @ weights.router_ED.float().T).softmax(1)
    value, index = probability.topk(2)
    gates = torch.zeros_like(probability).scatter_(1, index, value / value.sum(1, keepdim=True))
    assert weights.gate_EFD is not None
    gate = torch.einsum("td,efd->tef", hidden_TD, weights.gate_EFD.float())
    up = torch.einsum("td,efd->tef", hidden_TD, weights.up_EFD.float())
    return (gates[:, :, None] * torch.nn.functional.silu(gate) * up).flatten(1), gates


@pytest.mark.parametrize("kept", [True, False])
def test_features_and_targets_equal_the_dense_ones(kept: bool, tiny: Callable[..., Path]) -> None:
    """Kept in memory after the first pass over them, or computed in every pass."""
    data = tokens(padded=True)
    original, smaller = models(tiny("mixtral"))
    run = SequentialPass(original, smaller, data, (), streams_plan(original, smaller, data, (), sample_tokens=64))
    with torch.inference_mode():
        for layer in run.layers():
            assert isinstance(layer, SequentialLayer)
            experts = [_wide(layer.weights, (expert,)) for expert in range(8)]
            problem = layer.features(experts, layer.weights)
            if not kept:
                problem._room = 0
            hidden, wanted = inputs_and_targets(run)
            features, _ = dense_features(layer, hidden, original)
            for _ in range(2):
                parts = [part for held in (False, True) for part in problem.rows(held)]
                assert sum(part.num_tokens for part in parts) == len(hidden) == 116
                matrix = torch.randn(features.shape[1], 3, generator=torch.Generator().manual_seed(0))
                found, energy = torch.zeros_like(matrix), 0.0
                cross = torch.zeros(features.shape[1], wanted.shape[1])
                for part in parts:
                    part.add_transposed(part.times(matrix), found)
                    part.add_transposed(part.target(), cross)
                    energy += part.energy(part.target())
                assert torch.allclose(found, features.T @ (features @ matrix), atol=1e-3, rtol=1e-3)
                assert torch.allclose(cross, features.T @ wanted, atol=1e-3, rtol=1e-3)
                assert energy == pytest.approx(wanted.square().sum().item(), rel=1e-4)
            assert any(part.features is not None for part in problem._parts[False]) == kept
            layer.finish(layer.weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_original_experts_give_what_the_layer_should_add(family: str, tiny: Callable[..., Path]) -> None:
    """In front of the first compressed layer both streams are the same: nothing is left to solve, biases included."""
    data = tokens(padded=True)
    original, smaller = models(tiny(family))
    run = SequentialPass(original, smaller, data, (), streams_plan(original, smaller, data, (), sample_tokens=64))
    with torch.inference_mode():
        layer = next(layer for layer in run.layers() if isinstance(layer, SequentialLayer))
        experts = [_wide(layer.weights, (expert,)) for expert in range(8)]
        down = torch.cat([expert.down_DW.T for expert in experts])
        for held in (False, True):
            for part in layer.features(experts, layer.weights).rows(held):
                target = part.target()
                assert target.abs().max() > 1e-4
                assert torch.allclose(part.times(down), target, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_among_any_number_of_experts_is_that_of_a_model_built_for_it(
    family: str, tiny: Callable[..., Path]
) -> None:
    """Group-limited routers part the scores by a number that is the model's own: naee ended in an error there."""
    found: dict[int, list[Tensor]] = {}
    for keep in (8, 6):
        original, smaller = models(tiny(family), keep)
        plan = streams_plan(original, smaller, tokens(), (), sample_tokens=64)
        with torch.inference_mode():
            layers = SequentialPass(original, smaller, tokens(), (), plan).layers()
            layer = next(layer for layer in layers if isinstance(layer, SequentialLayer))
            sample = layer.sample()
            for kept in (torch.arange(8), torch.tensor([0, 1, 3, 4, 6, 7])):
                found.setdefault(keep, []).extend(sample.route(sample.logits_NE[:, kept], kept))
            layer.finish(layer.weights) if keep == 8 else None
            layers.close()
    for one, other in zip(found[8], found[6], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def inputs_and_targets(run: SequentialPass) -> tuple[Tensor, Tensor]:
    """Of the real tokens, [T, D] each, for a family without a residual multiplier."""
    masks = [
        torch.ones(batch.input_ids.numel(), dtype=torch.bool)
        if batch.attention_mask is None
        else batch.attention_mask.view(-1)
        for batch in run.batches
    ]
    hidden = torch.cat([run.inputs[i].flatten(0, 1)[mask] for i, mask in enumerate(masks)])
    wanted = torch.cat([(run.before[i] - run.without[i]).flatten(0, 1)[mask] for i, mask in enumerate(masks)])
    return hidden, wanted


def test_spilled_streams_give_the_same_result(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data, path = tokens(), tiny("qwen2_moe")

    def halved(layer: SequentialLayer) -> LayerWeights:
        return LayerWeights(**{**layer.weights.tensors(), "down_EDF": layer.weights.down_EDF / 2})

    kept = streams(path, data, halved)
    monkeypatch.setattr("moetools.forward.memory.MemoryPlan.activation_budget", property(lambda _: 0))
    spilled = streams(path, data, halved)
    assert spilled.after.spilled
    assert not kept.after.spilled
    for number in range(len(data.batches)):
        assert torch.equal(kept.after[number], spilled.after[number])


def test_a_member_refit_is_the_dense_ridge_solution(tiny: Callable[..., Path]) -> None:
    """Every new down projection solves the dense ridge problem for one of the ridges; held-out tokens get no worse."""
    data = tokens(padded=True, sequences=16)
    original, smaller = models(tiny("mixtral"), keep=3)
    decision = ExpertDecision(
        clusters=((0, 3, 5), (1, 2), (4,)), weights=((0.5, 0.2, 0.3), (0.4, 0.6), (1.0,)), details={}
    )
    plan = streams_plan(original, smaller, data, (), sample_tokens=64)
    run, solved_any = SequentialPass(original, smaller, data, (), plan), 0
    with torch.inference_mode():
        for layer in run.layers():
            assert isinstance(layer, SequentialLayer)
            old, new = layer.weights, combine_experts(layer.weights, decision)
            members = [[_wide(old, (expert,)) for expert in cluster] for cluster in decision.clusters]
            experts = [_wide(new, (expert,)) for expert in range(3)]
            solved, facts = _solved_for_members(layer, decision, new)
            hidden, _ = inputs_and_targets(run)
            chosen = (hidden @ new.router_ED.float().T).topk(2).indices
            assert facts["warning"] is None
            assert facts["held_out_after"] <= facts["held_out_before"]
            assert torch.equal(solved[2].down_DW, experts[2].down_DW)
            for expert in (0, 1):
                x = hidden[(chosen == expert).any(1)].double()

                def inside(wide, x=x):
                    return torch.nn.functional.silu(x @ wide.gate_WD.double().T) * (x @ wide.up_WD.double().T)

                wanted = sum(
                    share * inside(member) @ member.down_DW.double().T
                    for share, member in zip(decision.weights[expert], members[expert], strict=True)
                )
                p, start = inside(experts[expert]), experts[expert].down_DW.double().T
                change, missing = solved[expert].down_DW.double().T - start, p.T @ (wanted - p @ start)
                if change.abs().max() < 1e-6:
                    continue
                # (P^T P + lambda I) change = missing determines lambda, and must hold for it.
                damped = missing - p.T @ (p @ change)
                lam = (change * damped).sum() / change.square().sum()
                ridge = (lam / (p.T @ p).diagonal().mean()).item()
                assert min(abs(ridge / each - 1) for each in RIDGES) < 0.02
                assert torch.allclose(lam * change, damped, atol=1e-3 * float(missing.abs().max()))
                solved_any += 1
            layer.finish(new)
    assert solved_any


def test_merged_experts_with_few_tokens_keep_their_mean_and_most_of_them_are_refused(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tokens()
    original, smaller = models(tiny("mixtral"), keep=3)
    decision = ExpertDecision(clusters=((0, 1), (2, 3), (4,)), weights=((0.5, 0.5), (0.5, 0.5), (1.0,)), details={})
    plan = streams_plan(original, smaller, data, (), sample_tokens=64)
    run, changed = SequentialPass(original, smaller, data, (), plan), 0
    with torch.inference_mode():
        for layer in run.layers():
            assert isinstance(layer, SequentialLayer)
            new = combine_experts(layer.weights, decision)
            train = [sequence for sequence in range(12) if sequence % 7 != 6]
            hidden = torch.cat([run.inputs[i] for i in range(3)])[train].flatten(0, 1)
            chosen = (hidden @ new.router_ED.float().T).topk(2).indices
            counts = torch.bincount(chosen.flatten(), minlength=3)[:2].tolist()
            assert counts[0] != counts[1]
            monkeypatch.setattr("moetools.passes.layer_reduction.FEW_TOKENS", max(counts))
            solved, facts = _solved_for_members(layer, decision, new)
            poor, rich = (0, 1) if counts[0] < counts[1] else (1, 0)
            assert f"1 of 2 merged experts got fewer than the {max(counts)} calibration" in facts["warning"]
            assert f"{poor} ({counts[poor]})" in facts["warning"]
            for same in (poor, 2):
                assert torch.equal(solved[same].down_DW, new.down_EDF[same].float())
            changed += not torch.equal(solved[rich].down_DW, new.down_EDF[rich].float())
            monkeypatch.setattr("moetools.passes.layer_reduction.FEW_TOKENS", max(counts) + 1)
            with pytest.raises(StatisticsError, match=f"2 of 2 merged experts .* {rich} \\({counts[rich]}\\)"):
                _solved_for_members(layer, decision, new)
            layer.finish(new)
    assert changed
