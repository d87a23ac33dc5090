"""What an observer sees is what stock transformers routed and what each expert alone computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from streamed import mixed_batches, open_model, stock_logits_of, token_batch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from moetools.forward.experts import _expert_by_expert, _grouped, experts_forward, observe, use_experts
from moetools.forward.streaming import LayerObserver, StreamedModel
from moetools.statistics.base import RoutedBatch
from moetools.text.tokens import TokenBatch

BOTH = frozenset({"output", "intermediate"})


def observed(model: StreamedModel, batches: list[TokenBatch], reads: frozenset = BOTH) -> dict[int, list[RoutedBatch]]:
    """All batches through all layers, and what each MoE layer showed."""
    hidden = [model.skeleton.enter(batch)[0] for batch in batches]
    seen: dict[int, list[RoutedBatch]] = {index: [] for index in range(model.num_layers)}
    with torch.inference_mode():
        for layer in model.layers():
            observer = LayerObserver(seen[layer.index].append)
            with model.observe(layer, reads, observer):
                for number, batch in enumerate(batches):
                    observer.batch = batch
                    hidden[number] = model.run_layer(layer, batch, hidden[number])
    return {index: found for index, found in seen.items() if found}


def stock_calls(model: nn.Module, batch: TokenBatch) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """(hidden, indices, weights) that each layer's experts got in a stock run, by layer."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            layer = int(name.split("layers.")[1].split(".")[0])

            def note(module: nn.Module, args: tuple, kwargs: dict, layer: int = layer) -> None:
                found[layer] = tuple(tensor.clone() for tensor in (*args, *kwargs.values()))

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    stock_logits_of(model, batch)
    for handle in handles:
        handle.remove()
    return found


def stock_block(model: nn.Module, layer: int) -> dict[str, Tensor]:
    """The parameters of a layer's router and experts, by their last names."""
    block = model.model.layers[layer]
    return {name: tensor for name, tensor in block.state_dict().items() if "self_attn" not in name}


def one_expert(family: str, experts: dict[str, Tensor], expert: int, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Intermediate and output of one expert alone, by hand."""
    parts = {name.split("experts.")[1]: tensor[expert] for name, tensor in experts.items() if ".experts." in name}
    if family == "gpt_oss":
        fused = hidden_TD @ parts["gate_up_proj"] + parts["gate_up_proj_bias"]
        gate, up = fused[:, 0::2].clamp(max=7.0), fused[:, 1::2].clamp(-7.0, 7.0)
        intermediate = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return intermediate, intermediate @ parts["down_proj"] + parts["down_proj_bias"]
    width = parts["down_proj"].shape[1]
    gate, up = hidden_TD @ parts["gate_up_proj"][:width].T, hidden_TD @ parts["gate_up_proj"][width:].T
    intermediate = functional.silu(gate) * up
    return intermediate, intermediate @ parts["down_proj"].T


def real_rows(batch: TokenBatch) -> Tensor:
    count = batch.input_ids.numel()
    return torch.arange(count) if batch.attention_mask is None else batch.attention_mask.reshape(-1).nonzero()[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_equals_an_independent_stock_run(family, tiny, stock):
    """The choice and weights stock's experts were called with, and the logits by the router's own rows."""
    reference, batches = stock(tiny(family)), mixed_batches()
    model = open_model(tiny(family))
    found = observed(model, batches)
    assert list(found) == sorted(model.stock.moe_layers)
    for number, batch in enumerate(batches):
        rows = real_rows(batch)
        for layer, (hidden, index, weight) in stock_calls(reference, batch).items():
            seen = found[layer][number]
            assert torch.equal(seen.hidden_TD, hidden.flatten(0, -2)[rows])
            assert torch.equal(seen.topk_index_TK, index[rows])
            assert torch.equal(seen.topk_weight_TK, weight[rows])
            block = stock_block(reference, layer)
            router = next(t for name, t in block.items() if name.endswith((".gate.weight", ".router.weight")))
            bias = next((t for name, t in block.items() if name.endswith("router.bias")), None)
            expected = functional.linear(hidden.flatten(0, -2)[rows], router, bias)
            assert torch.allclose(seen.router_logits_TE, expected, atol=1e-5)
            assert seen.router_logits_TE.dtype == torch.float32
            assert torch.equal(seen.task_T, batch.task[0].expand(len(rows)))


def routed_by_hand(family: str, logits_TE: Tensor, correction_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Published routing rules, token by token: {softmax, sigmoid + bias, group-limited, top-k then softmax}."""
    extra = {"qwen2_moe": False, "olmoe": False, "flex_olmo": False, "deepseek_v2": False}
    top_k = FAMILIES[family].get("num_experts_per_tok") or FAMILIES[family]["moe_k"]
    indices, weights = [], []
    for logits in logits_TE:
        if family in ("gpt_oss", "granitemoe"):
            best = logits.topk(top_k)
            indices.append(best.indices)
            weights.append(best.values.softmax(0))
            continue
        sigmoid = family in ("deepseek_v3", "glm4_moe", "dots1", "minimax_m2")
        scores = logits.sigmoid() if sigmoid else logits.softmax(0)
        choice = scores if correction_E is None else scores + correction_E
        if family in ("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1"):
            best_of_group = choice.view(2, 4).topk(1 if family == "deepseek_v2" else 2).values.sum(1)
            keep = best_of_group.argmax()
            choice = torch.where(torch.arange(8) // 4 == keep, choice, -torch.inf)
        chosen = choice.topk(top_k).indices
        weight = scores[chosen]
        weight = weight / weight.sum() if extra.get(family, True) else weight
        indices.append(chosen)
        weights.append(weight * FAMILIES[family].get("routed_scaling_factor", 1.0))
    return torch.stack(indices), torch.stack(weights)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "phimoe"])
def test_routing_follows_the_published_rule(family, tiny):
    model = open_model(tiny(family))
    found = observed(model, [token_batch(2, 12, padding=(0, 5))])
    stored = model.checkpoint.read(name for name in model.checkpoint.tensors if "correction_bias" in name)
    for layer, (seen,) in found.items():
        correction = next((t.float() for name, t in stored.items() if f"layers.{layer}." in name), None)
        correction = None if correction is None else correction.reshape(-1)
        index_TK, weight_TK = routed_by_hand(family, seen.router_logits_TE, correction)
        dense = torch.zeros(2, len(index_TK), 8)
        dense[0].scatter_(1, index_TK, weight_TK)
        dense[1].scatter_(1, seen.topk_index_TK, seen.topk_weight_TK)
        assert torch.allclose(dense[0], dense[1], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_are_each_expert_alone(family, tiny, stock):
    batches = mixed_batches()
    for layer, batches_seen in observed(open_model(tiny(family)), batches).items():
        experts = stock_block(stock(tiny(family)), layer)
        for seen in batches_seen:
            slots, top_k = seen.slots, seen.topk_index_TK.shape[1]
            chosen = zip(seen.topk_index_TK.tolist(), seen.topk_weight_TK.tolist(), strict=True)
            pairs = {
                (token, expert): weight
                for token, (experts_K, weights_K) in enumerate(chosen)
                for expert, weight in zip(experts_K, weights_K, strict=True)
            }
            assert len(pairs) == len(slots.token_S) == len(seen.hidden_TD) * top_k
            triples = zip(slots.token_S.tolist(), slots.expert_S.tolist(), slots.weight_S.tolist(), strict=True)
            assert {(token, expert): weight for token, expert, weight in triples} == pairs
            assert torch.equal(slots.counts_E, torch.bincount(seen.topk_index_TK.flatten(), minlength=8))
            assert torch.equal(slots.expert_S, torch.arange(8).repeat_interleave(slots.counts_E))
            for expert in range(8):
                mine = slots.expert_S == expert
                intermediate, output = one_expert(family, experts, expert, seen.hidden_TD[slots.token_S[mine]])
                assert torch.allclose(slots.intermediate_SF[mine], intermediate, atol=1e-5)
                assert torch.allclose(slots.output_SD[mine], output, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_canonical_weights_compute_the_expert(family, tiny, stock):
    """f_e(x) of `LayerWeights`, with gpt-oss's own activation, against the stock module fed one expert only."""
    model = open_model(tiny(family))
    hidden_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for layer in model.layers(keep_native=True, fill=False):
        if layer.index not in model.stock.moe_layers:
            continue
        weights = {name: tensor.float() for name, tensor in model.weights(layer).tensors().items()}
        moe = model.stock.moe_layers[layer.index]
        experts = stock(tiny(family)).model.layers[layer.index].get_submodule(f"{moe.block}.experts")
        for e in (0, 3, 7):
            gate = hidden_TD @ weights["gate_EFD"][e].T
            up = hidden_TD @ weights["up_EFD"][e].T
            if family == "gpt_oss":
                gate, up = gate + weights["gate_bias_EF"][e], up + weights["up_bias_EF"][e]
                gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
                inside = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            else:
                inside = functional.silu(gate) * up
            output = inside @ weights["down_EDF"][e].T
            if "down_bias_ED" in weights:
                output = output + weights["down_bias_ED"][e]
            with torch.no_grad():
                expected = experts(hidden_TD, torch.full((5, 1), e), torch.ones(5, 1))
            assert torch.allclose(output, expected, atol=1e-5)


@pytest.mark.parametrize("reads", [frozenset(), frozenset({"output"}), frozenset({"intermediate"})])
def test_nothing_is_kept_unasked(reads, tiny):
    (seen,) = observed(open_model(tiny("mixtral")), [token_batch(2, 6)], reads)[0]
    assert (seen.slots.output_SD is not None) == ("output" in reads)
    assert (seen.slots.intermediate_SF is not None) == ("intermediate" in reads)


def test_observing_changes_no_result(tiny):
    model, batch = open_model(tiny("gpt_oss")), token_batch(2, 6, padding=(0, 2))
    with torch.inference_mode():
        hidden = model.skeleton.enter(batch)[0]
        for layer in model.layers():
            plain = model.run_layer(layer, batch, hidden)
            observer = LayerObserver(lambda seen: None)
            observer.batch = batch
            with model.observe(layer, BOTH, observer):
                assert torch.equal(model.run_layer(layer, batch, hidden), plain)
            hidden = plain


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left_behind(fails, tiny):
    model = open_model(tiny("mixtral"))
    layer = next(iter(model.layers(prefetch=False)))
    block = layer.module.get_submodule(model.stock.moe_layers[0].block)
    before = {name: dict(module.__dict__) for name, module in block.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in block.named_modules()}

    def look() -> None:
        with observe(block, router="gate", experts="experts", reads=BOTH, callback=lambda call: None):
            assert len(block.gate._forward_hooks) == 1
            assert len(block.experts.__dict__) > len(before["experts"])
            if fails:
                raise RuntimeError("inside")

    if fails:
        with pytest.raises(RuntimeError, match="inside"):
            look()
    else:
        look()
    assert {name: len(module._forward_hooks) for name, module in block.named_modules()} == hooks
    assert {name: module.__dict__.keys() for name, module in block.named_modules()} == {
        name: attributes.keys() for name, attributes in before.items()
    }


class UngatedExperts(nn.Module):
    """An experts module as transformers describes it: no gate, relu squared."""

    is_transposed, has_gate, has_bias, num_experts = False, False, False, 4

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up_proj = nn.Parameter(torch.randn(4, 6, 5, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(4, 5, 6, generator=generator))
        self.act_fn = lambda x: functional.relu(x) ** 2


def test_experts_without_gate():
    experts, hidden_TD = UngatedExperts(), torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    index_TK = torch.tensor([[0, 1], [1, 0], [3, 1], [3, 0], [0, 3], [1, 3], [0, 1]])
    weight_TK = torch.rand(7, 2, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros(7, 5)
    for token in range(7):
        for expert, weight in zip(index_TK[token].tolist(), weight_TK[token], strict=True):
            inside = functional.relu(experts.up_proj[expert] @ hidden_TD[token]) ** 2
            expected[token] += weight * (experts.down_proj[expert] @ inside)
    with torch.no_grad():
        assert torch.allclose(experts_forward(experts, hidden_TD, index_TK, weight_TK), expected, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_experts_and_their_gradients_equal_stock(tiny: Callable[..., Path], family: str) -> None:
    ids = torch.randint(2, 128, (3, 24), generator=torch.Generator().manual_seed(5))
    found = []
    for ours in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
        model.set_experts_implementation("eager")
        if ours:
            use_experts(model)
        logits = model(input_ids=ids, use_cache=False).logits
        logits.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if "experts." in n or "gate.weight" in n}
        found.append((logits.detach(), grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj"])
def test_frozen_weights_get_no_gradient_and_change_no_other(tiny: Callable[..., Path], frozen: str) -> None:
    ids = torch.randint(2, 128, (2, 12), generator=torch.Generator().manual_seed(5))
    found = []
    for frozen_name in ("nothing", frozen):
        model = AutoModelForCausalLM.from_pretrained(tiny("mixtral"), dtype=torch.float32).eval()
        use_experts(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen_name not in name)
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in found[1].items():
        if frozen in name:
            assert grad is None
        else:
            assert grad.abs().sum() > 0
            assert torch.equal(grad, found[0][name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_grouped_kernel_equals_the_loop():
    torch.manual_seed(0)
    counts_E = torch.tensor([5, 0, 17, 42], device="cuda")
    hidden_SI = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16)
    weight_EOI = torch.randn(4, 48, 32, device="cuda", dtype=torch.bfloat16)
    loop = _expert_by_expert(hidden_SI, weight_EOI.transpose(1, 2), counts_E)
    assert torch.allclose(_grouped(hidden_SI, weight_EOI.transpose(1, 2), counts_E), loop, atol=0.1, rtol=0.02)
