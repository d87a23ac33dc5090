"""The two-stream pass against a model run whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import StatisticsError
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.methods.base import ExpertDecision, combine_experts
from moetools.methods.refit import RIDGES
from moetools.passes.layer_reduction import _wide
from moetools.passes.sequential import SequentialLayer, SequentialPass
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
    run = SequentialPass(original, smaller, data, ())
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


def test_normal_equations_equal_the_dense_product(tiny: Callable[..., Path]) -> None:
    data = tokens(padded=True)
    original, smaller = models(tiny("mixtral"))
    run = SequentialPass(original, smaller, data, ())
    with torch.inference_mode():
        for layer in run.layers():
            assert isinstance(layer, SequentialLayer)
            experts = [_wide(layer.weights, (expert,)) for expert in range(8)]
            train, held = layer.normal_equations(experts, layer.weights)
            both = train.plus(held)
            masks = [
                torch.ones(40, dtype=torch.bool) if b.attention_mask is None else b.attention_mask.view(-1)
                for b in data.batches
            ]
            hidden = torch.cat([run.inputs[i].flatten(0, 1)[mask] for i, mask in enumerate(masks)])
            wanted = torch.cat([(run.before[i] - run.without[i]).flatten(0, 1)[mask] for i, mask in enumerate(masks)])
            features, _ = dense_features(layer, hidden, original)
            assert torch.allclose(both.gram_NN, features.T @ features, atol=1e-3, rtol=1e-3)
            assert torch.allclose(both.cross_ND, features.T @ wanted, atol=1e-3, rtol=1e-3)
            assert both.energy == pytest.approx(wanted.square().sum().item(), rel=1e-4)
            assert held.energy > 0
            layer.finish(layer.weights)


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


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_a_blocked_refit_approaches_the_joint_one(family: str, tiny: Callable[..., Path]) -> None:
    """Many sweeps of block coordinate descent reach nearly the joint optimum, and no sweep makes the layer worse."""
    data = tokens(padded=True)
    original, smaller = models(tiny(family), keep=4)
    run = SequentialPass(original, smaller, data, ())
    with torch.inference_mode():
        for layer in run.layers():
            assert isinstance(layer, SequentialLayer)
            kept = layer.weights.select(torch.arange(4))
            experts = [_wide(kept, (expert,)) for expert in range(4)]
            once, facts = layer.refit_one_by_one(experts, kept, sweeps=1)
            assert facts["held_out_after"] <= facts["held_out_before"] + 1e-6
            train, held = layer.normal_equations(experts, kept)
            start = torch.cat([expert.down_DW.T for expert in experts])
            if kept.down_bias_ED is None:  # else the two count the fixed bias in different places
                assert held.error(start.double()) / held.energy == pytest.approx(facts["held_out_before"], rel=1e-2)
            both = train.plus(held)
            errors = [
                both.error(torch.cat([expert.down_DW.T for expert in found]).double()) for found in (experts, once)
            ]
            assert errors[1] < errors[0]
            layer.finish(kept)


def test_with_one_expert_per_token_blocked_is_joint(tiny: Callable[..., Path]) -> None:
    """No token is shared, so the Gram is block-diagonal and one sweep solves it (ridges differ per block only)."""
    data = tokens()
    original, smaller = models(tiny("mixtral", num_experts_per_tok=1), keep=4)
    run = SequentialPass(original, smaller, data, ())
    with torch.inference_mode():
        for layer in run.layers():
            assert isinstance(layer, SequentialLayer)
            kept = layer.weights.select(torch.arange(4))
            experts = [_wide(kept, (expert,)) for expert in range(4)]
            train, _ = layer.normal_equations(experts, kept)
            width = experts[0].width
            blocks = torch.block_diag(
                *(train.gram_NN[i : i + width, i : i + width] for i in range(0, 4 * width, width))
            )
            assert torch.equal(train.gram_NN, blocks)
            layer.refit_one_by_one(experts, kept)
            layer.finish(kept)


def test_a_member_refit_is_the_dense_ridge_solution(tiny: Callable[..., Path]) -> None:
    """Every refitted down projection is the dense solution for one of the ridges, and no worse on held-out tokens."""
    data = tokens(padded=True, sequences=16)
    original, smaller = models(tiny("mixtral"), keep=3)
    decision = ExpertDecision(
        clusters=((0, 3, 5), (1, 2), (4,)), weights=((0.5, 0.2, 0.3), (0.4, 0.6), (1.0,)), details={}
    )
    run, solved_any = SequentialPass(original, smaller, data, ()), 0
    with torch.inference_mode():
        for layer in run.layers():
            assert isinstance(layer, SequentialLayer)
            old, new = layer.weights, combine_experts(layer.weights, decision)
            members = [[_wide(old, (expert,)) for expert in cluster] for cluster in decision.clusters]
            experts = [_wide(new, (expert,)) for expert in range(3)]
            solved, facts = layer.refit_to_members(experts, decision, new)
            masks = [
                torch.ones(batch.input_ids.numel(), dtype=torch.bool)
                if batch.attention_mask is None
                else batch.attention_mask.view(-1)
                for batch in data.batches
            ]
            hidden = torch.cat([run.inputs[i].flatten(0, 1)[mask] for i, mask in enumerate(masks)])
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
                candidates = [start]
                for ridge in RIDGES:
                    lam = ridge * (p.T @ p).diagonal().mean()
                    tall = torch.cat((p, lam.sqrt() * torch.eye(p.shape[1], dtype=torch.float64)))
                    rest = torch.cat((wanted - p @ start, torch.zeros_like(start)))
                    candidates.append(start + torch.linalg.lstsq(tall, rest).solution)
                gaps = [(solved[expert].down_DW.double().T - each).abs().max().item() for each in candidates]
                assert min(gaps) < 1e-4
                solved_any += gaps[0] > 1e-3
            layer.finish(new)
    assert solved_any


def test_merged_experts_with_few_tokens_keep_their_mean_and_most_of_them_are_refused(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tokens()
    original, smaller = models(tiny("mixtral"), keep=3)
    decision = ExpertDecision(clusters=((0, 1), (2, 3), (4,)), weights=((0.5, 0.5), (0.5, 0.5), (1.0,)), details={})
    run = SequentialPass(original, smaller, data, ())
    with torch.inference_mode():
        for layer in run.layers():
            assert isinstance(layer, SequentialLayer)
            new = combine_experts(layer.weights, decision)
            experts = [_wide(new, (expert,)) for expert in range(3)]
            train = [sequence for sequence in range(12) if sequence % 7 != 6]
            hidden = torch.cat([run.inputs[i] for i in range(3)])[train].flatten(0, 1)
            chosen = (hidden @ new.router_ED.float().T).topk(2).indices
            counts = torch.bincount(chosen.flatten(), minlength=3)[:2].tolist()
            assert counts[0] != counts[1]
            monkeypatch.setattr("moetools.passes.sequential.FEW_TOKENS", max(counts))
            solved, facts = layer.refit_to_members(experts, decision, new)
            poor, rich = (0, 1) if counts[0] < counts[1] else (1, 0)
            assert f"1 of 2 merged experts got fewer than the {max(counts)} calibration" in facts["warning"]
            assert f"{poor} ({counts[poor]})" in facts["warning"]
            assert torch.equal(solved[poor].down_DW, experts[poor].down_DW)
            monkeypatch.setattr("moetools.passes.sequential.FEW_TOKENS", max(counts) + 1)
            with pytest.raises(StatisticsError, match=f"2 of 2 merged experts .* {rich} \\({counts[rich]}\\)"):
                layer.refit_to_members(experts, decision, new)
            layer.finish(new)
