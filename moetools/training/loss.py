"""The distillation loss behind a language model's head, some rows at a time: [T, V] logits never exist as a whole.

Letters: T predicted tokens, V vocabulary, D and H widths of student and teacher, C entries of a top-k cache per token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from moetools.forward.head import head_rows

Divergence = Literal["forward", "reverse", "jsd"]


@dataclass(frozen=True, kw_only=True)
class Head:
    """What turns hidden states into logits: scale * (hidden @ weight^T + bias)."""

    weight_VD: Float[Tensor, "V D"]
    bias_V: Float[Tensor, "V"] | None = None
    scale: float = 1.0

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V], at least fp32."""
        logits = functional.linear(hidden_RD, self.weight_VD, self.bias_V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.scale == 1.0 else logits * self.scale

    def first(self, size: int) -> "Head":
        """The head of the first `size` tokens; further rows are padding."""
        if size == len(self.weight_VD):
            return self
        bias = None if self.bias_V is None else self.bias_V[:size]
        return Head(weight_VD=self.weight_VD[:size], bias_V=bias, scale=self.scale)


@dataclass(frozen=True, kw_only=True)
class FullTargets:
    """The teacher's distributions over the whole vocabulary, as hidden states and head."""

    hidden_TH: Float[Tensor, "T H"]
    head: Head


@dataclass(frozen=True, kw_only=True)
class TopTargets:
    """The teacher's most likely tokens.

    Attributes:
        index_TC: their ids.
        log_prob_TC: their log-probabilities at temperature 1.
        log_tail_T: log of what all other tokens have together.
    """

    index_TC: Int[Tensor, "T C"]
    log_prob_TC: Float[Tensor, "T C"]
    log_tail_T: Float[Tensor, "T"]


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """alpha * CE + (1 - alpha) * divergence, summed over tokens.

    Attributes:
        alpha: weight of the cross-entropy with the text's next token, 0 to 1.
        temperature: tau; the divergence is that of softmax(logits / tau), times tau^2, so that its gradient keeps its
            size (Hinton et al. 2015, arXiv 1503.02531, section 2).
        divergence: "forward" KL(teacher || student), "reverse" KL(student || teacher), or "jsd", the mean of both KLs
            from their mixture in halves.
    """

    alpha: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = "forward"


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums over T tokens, in nats; only `total` carries a gradient.

    Attributes:
        total: alpha * CE + (1 - alpha) * divergence.
        cross_entropy, divergence: the two parts, without their weights.
    """

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def distillation_loss(
    hidden_TD: Float[Tensor, "T D"],
    head: Head,
    label_T: Int[Tensor, "T"],
    targets: FullTargets | TopTargets | None,
    options: LossOptions,
) -> LossSums:
    """Loss of a student whose last hidden states are `hidden_TD`; differentiable in them and in the head.

    Gradients are computed chunk by chunk together with the loss, so the backward pass only scales them.

    With `TopTargets` the vocabulary is the cached tokens and one "all others" token: by the log-sum inequality the
    forward KL of that coarser view is at most the full one; the difference is at most the tail mass times the largest
    log-ratio in it. Only the forward divergence is defined for them.

    Args:
        label_T: the next token of each position.
        targets: None for cross-entropy alone.
    """
    need_divergence = targets is not None and options.alpha < 1.0
    rows = head_rows(hidden_TD.device, len(head.weight_VD))
    terms = _Terms(label_T, targets if need_divergence else None, options)
    total, cross_entropy, divergence = _Chunked.apply(
        hidden_TD, head.weight_VD, head.bias_V, head.scale, terms, rows, torch.is_grad_enabled()
    )
    return LossSums(total=total, cross_entropy=cross_entropy, divergence=divergence)


class _Terms:
    """Loss and its gradient in the logits, for some rows."""

    def __init__(self, label_T: Tensor, targets: FullTargets | TopTargets | None, options: LossOptions) -> None:
        self.label_T, self.targets, self.options = label_T, targets, options

    def __call__(self, rows: slice, logits_RV: Tensor, need_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """(sum of CE, sum of divergence, gradient of the weighted sum or None)."""
        options, label_R = self.options, self.label_T[rows, None]
        log_q = torch.log_softmax(logits_RV, -1)
        cross_entropy = -log_q.gather(-1, label_R).sum()
        divergence, grad = torch.zeros_like(cross_entropy), None
        if self.targets is not None:
            tau = options.temperature
            log_q_tau = log_q if tau == 1.0 else torch.log_softmax(logits_RV / tau, -1)
            divergence, grad = self._divergence(rows, log_q_tau, tau, need_grad)
            divergence = divergence * tau**2
            if grad is not None:
                grad = grad.mul_(tau * (1 - options.alpha))
        weight = options.alpha if self.targets is not None else 1.0
        if need_grad and weight:
            own = log_q.exp_().mul_(weight)
            own.scatter_add_(-1, label_R, torch.full_like(label_R, -weight, dtype=own.dtype))
            grad = own if grad is None else grad.add_(own)
        return cross_entropy, divergence, grad

    def _divergence(self, rows: slice, log_q: Tensor, tau: float, need_grad: bool) -> tuple[Tensor, Tensor | None]:
        """Divergence of the distributions at temperature tau, and its gradient in logits / tau."""
        if isinstance(self.targets, TopTargets):
            return _coarse_forward(self.targets, rows, log_q, tau, need_grad)
        assert self.targets is not None
        teacher = self.targets.head.logits(self.targets.hidden_TH[rows]).to(log_q.dtype)
        log_p = torch.log_softmax(teacher if tau == 1.0 else teacher / tau, -1)
        return _DIVERGENCES[self.options.divergence](log_p, log_q, need_grad)


class _Chunked(torch.autograd.Function):
    """Sums of `terms` over all rows; the gradients of hidden states and head are made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        scale: float,
        terms: Callable[[slice, Tensor, bool], tuple[Tensor, Tensor, Tensor | None]],
        rows: int,
        enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants = [enabled and needed for needed in ctx.needs_input_grad[:3]]
        head = Head(weight_VD=weight_VD, bias_V=bias_V, scale=scale)
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        sums = hidden_TD.new_zeros(2, dtype=torch.float64)
        grad_hidden = torch.empty_like(hidden_TD) if wants[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=dtype) if wants[1] else None
        grad_bias = torch.zeros_like(weight_VD[:, 0], dtype=dtype) if wants[2] else None
        for start in range(0, len(hidden_TD), rows):
            chunk = slice(start, start + rows)
            cross_entropy, divergence, grad_RV = terms(chunk, head.logits(hidden_TD[chunk]), any(wants))
            sums += torch.stack((cross_entropy, divergence)).double()
            if grad_RV is None:
                continue
            grad_RV = (grad_RV if scale == 1.0 else grad_RV * scale).to(hidden_TD.dtype)
            if grad_hidden is not None:
                torch.mm(grad_RV, weight_VD.to(grad_RV.dtype), out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight.add_(grad_RV.t() @ hidden_TD[chunk])
            if grad_bias is not None:
                grad_bias.add_(grad_RV.sum(0))
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        options, targets = terms.options, terms.targets  # type: ignore[attr-defined]
        alpha = options.alpha if targets is not None else 1.0
        total = alpha * sums[0] + (1 - alpha) * sums[1]
        ctx.mark_non_differentiable(sums)
        return total.to(dtype), sums[0].to(dtype), sums[1].to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found, (weight_dtype, bias_dtype) = ctx.saved_tensors, ctx.dtypes
        dtypes = (None, weight_dtype, bias_dtype)
        scaled = [
            None if grad is None else (grad * grads[0].to(grad.dtype)).to(dtype or grad.dtype)
            for grad, dtype in zip(found, dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _forward_kl(log_p: Tensor, log_q: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """sum p (log p - log q); gradient q - p."""
    p = log_p.exp()
    value = (p * (log_p - log_q)).sum()
    return value, log_q.exp().sub_(p) if need_grad else None


def _reverse_kl(log_p: Tensor, log_q: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """sum q (log q - log p); gradient q (log q - log p - KL)."""
    q, ratio = log_q.exp(), log_q - log_p
    kl = (q * ratio).sum(-1, keepdim=True)
    return kl.sum(), q * (ratio - kl) if need_grad else None


def _jensen_shannon(log_p: Tensor, log_q: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2; gradient q (log q - log m - KL(q || m)) / 2."""
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    own = (q * (log_q - log_m)).sum(-1, keepdim=True)
    value = 0.5 * ((p * (log_p - log_m)).sum() + own.sum())
    return value, 0.5 * q * (log_q - log_m - own) if need_grad else None


_DIVERGENCES: dict[str, Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]] = {
    "forward": _forward_kl,
    "reverse": _reverse_kl,
    "jsd": _jensen_shannon,
}


def _coarse_forward(
    targets: TopTargets, rows: slice, log_q: Tensor, tau: float, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Forward KL over the cached tokens and one token for all others.

    At a temperature other than 1 the teacher's tail is unknown; its mass there is taken to be spread as its total at
    temperature 1 over all other tokens alike.
    """
    index_RC = targets.index_TC[rows].long()
    log_p_RC, log_tail_R = (one[rows].to(log_q.dtype) for one in (targets.log_prob_TC, targets.log_tail_T))
    if tau != 1.0:
        log_others = math.log(max(log_q.shape[-1] - index_RC.shape[-1], 1))
        log_p_RC, log_tail_R = log_p_RC / tau, (log_tail_R - log_others) / tau + log_others
    # Rounded as they are in a cache, they do not add up to one by themselves.
    log_all_R = torch.logsumexp(torch.cat((log_p_RC, log_tail_R[:, None]), -1), -1)
    log_p_RC, log_tail_R = log_p_RC - log_all_R[:, None], log_tail_R - log_all_R
    log_q_RC = log_q.gather(-1, index_RC)
    log_q_tail_R = _log_rest(log_q_RC)
    p_RC, tail_R = log_p_RC.exp(), log_tail_R.exp()
    value = (p_RC * (log_p_RC - log_q_RC)).sum() + (tail_R * (log_tail_R - log_q_tail_R)).sum()
    if not need_grad:
        return value, None
    # d/dz of -tail * log(1 - sum q_C) adds q_v * tail / q_tail for the others, so that all of them share the tail.
    grad = log_q.exp()
    factor_R = 1 - (log_tail_R - log_q_tail_R).exp()
    inside_RC = log_q_RC.exp() - p_RC
    grad.mul_(factor_R[:, None]).scatter_(-1, index_RC, inside_RC)
    return value, grad


def _log_rest(log_prob_RC: Tensor) -> Tensor:
    """log(1 - sum of probabilities), at least log of the dtype's rounding."""
    rest = 1 - log_prob_RC.exp().sum(-1)
    return rest.clamp_min(torch.finfo(log_prob_RC.dtype).eps).log()
