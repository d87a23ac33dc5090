"""The experts' computation: every expert runs on the tokens routed to it and on no others, and may be watched.

Registered with transformers' experts interface, so it receives exactly the routing the model used, whatever the router.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moetools.statistics.base import Reads

IMPLEMENTATION = "moetools"
_OBSERVER = "_moetools_observer"
_SHARED = re.compile(r"shared_?(experts?|mlp)")
"""Names of shared experts inside a MoE block."""


@dataclass(frozen=True, kw_only=True)
class RoutedCall:
    """One call of a MoE block's experts, padding included; slots are sorted by expert (letters: `moetools.shapes`)."""

    hidden_TD: Float[Tensor, "T D"]
    router_logits_TE: Float[Tensor, "T E"]
    topk_index_TK: Int[Tensor, "T K"]
    topk_weight_TK: Float[Tensor, "T K"]
    token_S: Int[Tensor, "S"]
    expert_S: Int[Tensor, "S"]
    weight_S: Float[Tensor, "S"]
    counts_E: Int[Tensor, "E"]
    intermediate_SF: Float[Tensor, "S F"] | None
    output_SD: Float[Tensor, "S D"] | None
    routed_TD: Float[Tensor, "T D"] | None
    shared_TD: Float[Tensor, "T D"] | None = None


@dataclass
class _Observer:
    callback: Callable[[RoutedCall], None]
    reads: frozenset[Reads]
    compute: bool
    waits: bool
    router_logits: Tensor | None = None
    call: RoutedCall | None = None

    def see(self, call: RoutedCall) -> None:
        """Hand the call on; if the shared experts' part is asked for, when the whole block is done."""
        if self.waits:
            assert call.routed_TD is not None
            # Whoever adds the shared part may do it in place.
            self.call = replace(call, routed_TD=call.routed_TD.clone())
        else:
            self.callback(call)

    def finish(self, whole: Any) -> None:
        """The block's output is there."""
        call, self.call = self.call, None
        assert call is not None
        assert call.routed_TD is not None
        whole_TD = (whole[0] if isinstance(whole, tuple) else whole).reshape(len(call.routed_TD), -1)
        shared_TD = whole_TD.float() - call.routed_TD.float() if whole_TD.shape == call.routed_TD.shape else None
        self.callback(replace(call, shared_TD=shared_TD))


@contextlib.contextmanager
def observe(
    block: nn.Module,
    *,
    router: str,
    experts: str,
    reads: frozenset[Reads],
    callback: Callable[[RoutedCall], None],
    compute: bool = True,
) -> Iterator[None]:
    """Call `callback` with what the MoE block `block` routes and computes, until the context ends.

    `router` and `experts` are module paths inside the block. Activations not named in `reads` are not kept. With
    `compute=False` only the router runs: the experts are skipped, and their contribution is zero.
    """
    waits = compute and "shared" in reads and any(_SHARED.fullmatch(name) for name, _ in block.named_children())
    observer = _Observer(callback, reads, compute, waits)
    experts_module = block.get_submodule(experts)

    def keep_logits(_module: nn.Module, _args: Any, output: Any) -> None:
        observer.router_logits = _logits(output)

    handles = [block.get_submodule(router).register_forward_hook(keep_logits)]
    if waits:
        handles.append(block.register_forward_hook(lambda _module, _args, output: observer.finish(output)))
    experts_module.__dict__[_OBSERVER] = observer
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        del experts_module.__dict__[_OBSERVER]


def _logits(output: Any) -> Tensor:
    """The logits among what a router returns: first in the tuple, or last behind the indices (Granite before 5.23)."""
    if not isinstance(output, tuple):
        return output
    return output[0] if output[0].is_floating_point() else output[-1]


def register_experts() -> None:
    """Make `IMPLEMENTATION` known to transformers; calling it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def use_experts(model: Any) -> None:
    """Make a transformers model run its experts through `experts_forward`."""
    register_experts()
    model.set_experts_implementation(IMPLEMENTATION)


def experts_forward(
    self: Any,
    hidden_states: Float[Tensor, "T D"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """sum_k weight_k * f_{index_k}(x) per token; same numbers, bit for bit, as transformers' grouped_mm path on CPU.

    Differentiable in everything that requires a gradient. Slots are sorted by expert once; forward and backward are
    then one matrix product per expert and projection on contiguous rows, or one kernel for all experts (`_can_group`).
    """
    num_tokens, top_k = top_k_index.shape
    expert_S, order_S = torch.sort(top_k_index.reshape(-1))
    token_S = order_S // top_k
    counts_E = torch.bincount(expert_S, minlength=self.num_experts)
    observer: _Observer | None = self.__dict__.get(_OBSERVER)
    weight_S = top_k_weights.reshape(-1).index_select(0, order_S)
    intermediate_SF = output_SD = None
    if observer is not None and not observer.compute:
        result = torch.zeros_like(hidden_states)
    else:
        intermediate_SF, output_SD = _run(self, hidden_states.index_select(0, token_S), expert_S, counts_E)
        place_S = torch.empty_like(order_S)
        place_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
        weighted_SD = output_SD * weight_S.unsqueeze(-1)
        weighted_SD = weighted_SD.index_select(0, place_S)
        result = weighted_SD.view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)
    if observer is not None:
        assert observer.router_logits is not None, "the router ran before its experts"
        call = RoutedCall(
            hidden_TD=hidden_states,
            router_logits_TE=observer.router_logits.reshape(num_tokens, -1).float(),
            topk_index_TK=top_k_index,
            topk_weight_TK=top_k_weights.float(),
            token_S=token_S,
            expert_S=expert_S,
            weight_S=weight_S.float(),
            counts_E=counts_E,
            intermediate_SF=intermediate_SF if "intermediate" in observer.reads else None,
            output_SD=output_SD if "output" in observer.reads else None,
            routed_TD=result if observer.compute else None,
        )
        observer.see(call)
    return result


def _run(
    experts: Any, hidden_SD: Float[Tensor, "S D"], expert_S: Int[Tensor, "S"], counts_E: Int[Tensor, "E"]
) -> tuple[Float[Tensor, "S F"], Float[Tensor, "S D"]]:
    """Intermediate and ungated output of every slot."""
    fused_SF = _project(experts, "gate_up_proj" if experts.has_gate else "up_proj", hidden_SD, expert_S, counts_E)
    # The activation runs over all slots at once: on slices its vectorised tail would round differently from stock.
    intermediate_SF = experts._apply_gate(fused_SF) if experts.has_gate else experts.act_fn(fused_SF)
    output_SD = _project(experts, "down_proj", intermediate_SF, expert_S, counts_E)
    if getattr(experts, "has_post_expert_norm", False):
        output_SD = experts.post_expert_norm(output_SD)
    return intermediate_SF, output_SD


def _can_group(hidden: Tensor, weight: Tensor) -> bool:
    """Whether one grouped kernel launch beats a loop: bf16 on a CUDA device that has the kernel."""
    return (
        hidden.is_cuda
        and hidden.dtype == weight.dtype == torch.bfloat16
        and hasattr(functional, "grouped_mm")
        and torch.cuda.get_device_capability(hidden.device) >= (8, 0)
    )


def _expert_by_expert(hidden_SI: Tensor, weight_EIO: Tensor, counts_E: Tensor) -> Tensor:
    """Each expert's rows times its weight; experts without tokens cost nothing."""
    result = hidden_SI.new_empty(hidden_SI.shape[0], weight_EIO.shape[2])
    for expert, rows in _spans(counts_E):
        torch.mm(hidden_SI[rows], weight_EIO[expert], out=result[rows])
    return result


class _WithBackward(torch.autograd.Function):
    """`_expert_by_expert` without autograd looking into its loop; nothing is computed for frozen weights.

    y_s = x_s @ W_e for the rows s of expert e: dL/dx_s = g_s @ W_e^T, dL/dW_e = sum_s x_s^T g_s.
    """

    @staticmethod
    def forward(ctx: Any, hidden_SI: Tensor, weight_EIO: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_SI if ctx.needs_input_grad[1] else None, weight_EIO, counts_E)
        return _expert_by_expert(hidden_SI, weight_EIO, counts_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_SI, weight_EIO, counts_E = ctx.saved_tensors
        (grad_SO,) = grads
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_SI = grad_SO.new_empty(grad_SO.shape[0], weight_EIO.shape[1]) if needs_hidden else None
        grad_EIO = torch.zeros_like(weight_EIO) if needs_weight else None
        for expert, rows in _spans(counts_E):
            if grad_SI is not None:
                torch.mm(grad_SO[rows], weight_EIO[expert].t(), out=grad_SI[rows])
            if grad_EIO is not None:
                grad_EIO[expert] = hidden_SI[rows].t() @ grad_SO[rows]
        return grad_SI, grad_EIO, None


def _spans(counts_E: Tensor) -> list[tuple[int, slice]]:
    """Experts that have tokens, and their rows."""
    counts = counts_E.tolist()
    ends = itertools.accumulate(counts)
    spans = enumerate(slice(end - count, end) for count, end in zip(counts, ends, strict=True))
    return [(expert, rows) for expert, rows in spans if counts[expert]]


def _grouped(hidden_SI: Tensor, weight_EIO: Tensor, counts_E: Tensor) -> Tensor:
    """All experts in one kernel launch."""
    return functional.grouped_mm(hidden_SI, weight_EIO, offs=counts_E.cumsum(0).to(torch.int32))


def _project(
    experts: Any, name: str, hidden_SI: Float[Tensor, "S I"], expert_S: Int[Tensor, "S"], counts_E: Int[Tensor, "E"]
) -> Float[Tensor, "S O"]:
    """Projection `name` of each slot's own expert, bias included."""
    weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
    weight_EIO = weight if experts.is_transposed else weight.transpose(1, 2)
    if _can_group(hidden_SI, weight):
        result = _grouped(hidden_SI, weight_EIO, counts_E)
    elif torch.is_grad_enabled() and (hidden_SI.requires_grad or weight.requires_grad):
        result = _WithBackward.apply(hidden_SI, weight_EIO, counts_E)
    else:
        result = _expert_by_expert(hidden_SI, weight_EIO, counts_E)
    return result if bias is None else result + bias[expert_S]
