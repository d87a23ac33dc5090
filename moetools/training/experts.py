"""The experts' computation with a backward that is as cheap as it can be: nothing is computed for frozen weights.

Slots are sorted by expert once; forward and backward are then one matrix product per expert on contiguous rows, with no
scatter and without autograd looking into the loop. On bf16 on a GPU it is one grouped kernel per projection.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "moetools-training"


def use_trainable_experts(model: Any) -> None:
    """Make a transformers model run its experts through `trainable_experts`."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, trainable_experts)
    model.set_experts_implementation(IMPLEMENTATION)


def trainable_experts(
    self: Any,
    hidden_states: Float[Tensor, "T D"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """sum_k weight_k * f_{index_k}(x) per token, differentiable in everything that requires a gradient."""
    num_tokens, top_k = top_k_index.shape
    expert_S, order_S = torch.sort(top_k_index.reshape(-1), stable=True)
    counts_E = torch.bincount(expert_S, minlength=self.num_experts)
    hidden_SD = hidden_states.index_select(0, order_S // top_k)
    fused_SF = _project(self, "gate_up_proj" if self.has_gate else "up_proj", hidden_SD, expert_S, counts_E)
    inner_SF = self._apply_gate(fused_SF) if self.has_gate else self.act_fn(fused_SF)
    output_SD = _project(self, "down_proj", inner_SF, expert_S, counts_E)
    if getattr(self, "has_post_expert_norm", False):
        output_SD = self.post_expert_norm(output_SD)
    weighted_SD = output_SD * top_k_weights.reshape(-1).index_select(0, order_S).unsqueeze(-1)
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
    return weighted_SD.index_select(0, place_S).view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


def _project(experts: Any, name: str, hidden_SI: Tensor, expert_S: Tensor, counts_E: Tensor) -> Tensor:
    weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
    weight_EIO = weight if experts.is_transposed else weight.transpose(1, 2)
    if hidden_SI.is_cuda and hidden_SI.dtype == weight.dtype == torch.bfloat16:
        result = functional.grouped_mm(hidden_SI, weight_EIO, offs=counts_E.cumsum(0).to(torch.int32))
    else:
        result = _ExpertByExpert.apply(hidden_SI, weight_EIO, counts_E.tolist())
    return result if bias is None else result + bias[expert_S]


class _ExpertByExpert(torch.autograd.Function):
    """y_s = x_s @ W_e for the rows s of expert e: dL/dx_s = g_s @ W_e^T, dL/dW_e = sum_s x_s^T g_s."""

    @staticmethod
    def forward(ctx: Any, hidden_SI: Tensor, weight_EIO: Tensor, counts: list[int]) -> Tensor:
        result_SO = hidden_SI.new_empty(hidden_SI.shape[0], weight_EIO.shape[2])
        for expert, rows in _spans(counts):
            torch.mm(hidden_SI[rows], weight_EIO[expert], out=result_SO[rows])
        ctx.save_for_backward(hidden_SI if ctx.needs_input_grad[1] else None, weight_EIO)
        ctx.counts = counts
        return result_SO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_SI, weight_EIO = ctx.saved_tensors
        (grad_SO,) = grads
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_SI = grad_SO.new_empty(grad_SO.shape[0], weight_EIO.shape[1]) if needs_hidden else None
        grad_EIO = torch.zeros_like(weight_EIO) if needs_weight else None
        for expert, rows in _spans(ctx.counts):
            if grad_SI is not None:
                torch.mm(grad_SO[rows], weight_EIO[expert].t(), out=grad_SI[rows])
            if grad_EIO is not None:
                grad_EIO[expert] = hidden_SI[rows].t() @ grad_SO[rows]
        return grad_SI, grad_EIO, None


def _spans(counts: list[int]) -> list[tuple[int, slice]]:
    """Experts that have tokens, and their rows."""
    found, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found
