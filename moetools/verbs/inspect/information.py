"""Mutual information of counts."""

import torch
from torch import Tensor


def mutual_information(slots_GE: Tensor) -> Tensor:
    """I(row; column) in nats of counts [..., G, E]: H(row) + H(column) - H(row, column); 0 without counts."""
    joint_GE = slots_GE.double() / slots_GE.sum((-2, -1), keepdim=True).clamp(min=1)
    entropy = torch.special.entr
    marginals = entropy(joint_GE.sum(-1)).sum(-1) + entropy(joint_GE.sum(-2)).sum(-1)
    # Rounding may leave -1e-17 for independent counts.
    return (marginals - entropy(joint_GE).sum((-2, -1))).clamp(min=0)
