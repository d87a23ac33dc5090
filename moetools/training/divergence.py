"""KL of the student's next-token distribution from the teacher's over the whole vocabulary, some rows at a time."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20


def kl_divergence(
    teacher_TV: Float[Tensor, "T V"], student_TV: Float[Tensor, "T V"], *, temperature: float = 1.0
) -> Float[Tensor, "T"]:
    """Forward KL per token, in nats: tau^2 * sum_v p_v (log p_v - log q_v).

    p = softmax(teacher / tau), q = softmax(student / tau). The factor tau^2 keeps the size of the gradient
    tau * (q - p) independent of tau (Hinton et al. 2015, arXiv 1503.02531, section 2). Differentiable in `student_TV`;
    beside its gradient no [T, V] tensor is made.

    Args:
        teacher_TV: logits up to a constant per row, any float dtype.
        student_TV: logits.
    """
    return _KL.apply(teacher_TV, student_TV, temperature)


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher_TV: Tensor, student_TV: Tensor, temperature: float) -> Tensor:
        needs_grad = ctx.needs_input_grad[1]
        kl_T = student_TV.new_empty(student_TV.shape[0], dtype=torch.float32)
        grad_TV = torch.empty_like(student_TV) if needs_grad else None
        size = max(1, _CHUNK_ELEMENTS // student_TV.shape[1])
        for start in range(0, len(kl_T), size):
            rows = slice(start, start + size)
            log_p = torch.log_softmax(teacher_TV[rows].float() / temperature, dim=-1)
            log_q = torch.log_softmax(student_TV[rows].float() / temperature, dim=-1)
            p = log_p.exp()
            kl_T[rows] = temperature**2 * (p * (log_p - log_q)).sum(-1)
            if grad_TV is not None:
                grad_TV[rows] = log_q.exp_().sub_(p).mul_(temperature)
        ctx.save_for_backward(grad_TV)
        return kl_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad_TV,) = ctx.saved_tensors
        return None, grad_TV * grads[0].unsqueeze(-1).to(grad_TV.dtype), None
