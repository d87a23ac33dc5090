"""A few gradient steps on one FFN alone, towards recorded outputs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moetools.architectures.weights import WideExpert

_WARM_UP_SHARE = 0.1
_TRAINED = ("gate_WD", "up_WD", "down_DW", "gate_bias_W", "up_bias_W", "down_bias_D")


@dataclass(frozen=True, kw_only=True)
class LocalFit:
    """How one FFN is trained.

    Attributes:
        steps: of Adam, each on `batch_size` tokens drawn without replacement until all were used.
        learning_rate: step relative to the root mean square of each tensor.
    """

    steps: int
    learning_rate: float = 0.02
    batch_size: int = 1024
    seed: int = 0


def fit_bytes_locally(width: int, hidden_size: int, tokens: int) -> int:
    """Of the three matrices, a copy that is trained, its gradient, Adam's two moments and an intermediate of them.

    Beside them what one batch keeps for its gradients: inputs, targets, outputs, and three intermediates.
    """
    batch = min(tokens, LocalFit.batch_size) * (4 * hidden_size + 6 * width)
    return 4 * (6 * 3 * width * hidden_size + batch)


def fit_locally(
    ffn: WideExpert,
    hidden_TD: Float[Tensor, "T D"],
    target_TD: Float[Tensor, "T D"],
    activate: Callable[[Tensor | None, Tensor], Tensor],
    fit: LocalFit,
) -> WideExpert:
    """The FFN after training all its tensors: min mean over tokens of ||Y - down @ act(gate x, up x)||^2.

    The learning rate follows `learning_rate_factor`. The loss is divided by the mean of Y^2, which leaves Adam's steps
    as they are but keeps the numbers in range.
    """
    trained = {name: getattr(ffn, name) for name in _TRAINED if getattr(ffn, name) is not None}
    leaves = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in trained.items()}
    groups: list[dict[str, Any]] = [
        {"params": [leaf], "lr": fit.learning_rate * (leaf.detach().square().mean().sqrt().item() or 1e-3)}
        for leaf in leaves.values()
    ]
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(fit.seed)
    scale = target_TD.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    order: list[Tensor] = []
    with torch.enable_grad():
        for step in range(1, fit.steps + 1):
            if not order:
                order = list(torch.randperm(len(hidden_TD), generator=generator).split(fit.batch_size))
            rows = order.pop().to(hidden_TD.device)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate_factor(step, fit.steps)
            hidden = hidden_TD[rows]
            gate = None
            if "gate_WD" in leaves:
                gate = nn.functional.linear(hidden, leaves["gate_WD"], leaves.get("gate_bias_W"))
            up = nn.functional.linear(hidden, leaves["up_WD"], leaves.get("up_bias_W"))
            output = nn.functional.linear(activate(gate, up), leaves["down_DW"], leaves.get("down_bias_D"))
            loss = (output - target_TD[rows]).square().mean() / scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return replace(ffn, **{name: leaf.detach() for name, leaf in leaves.items()})


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 10 % of the steps, then half a cosine that would be zero after the last step.

    Args:
        step: 1 for the first.
    """
    warm_up = max(1, round(_WARM_UP_SHARE * steps))
    if step <= warm_up:
        return step / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up + 1)))
