"""Scales as integers times one fp16 number per super-block, for the least squared error of the weights."""

import torch
from jaxtyping import Float
from torch import Tensor

_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)


def fitted_units(
    scale_NG: Tensor, energy_NG: Tensor, least: int, most: int
) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N G"]]:
    """The d and integers k that minimise sum_g e_g (d k_g - s_g)^2, e_g the sum of the group's squared codes.

    That is the squared error of the weights, because codes stay. Tries ranges of k that the extreme scale reaches, each
    followed by the closed form of d for its k.

    Args:
        scale_NG: scales s [N, G] of N super-blocks of G groups.
        energy_NG: e.
        least, most: bounds of k.

    Returns:
        d, already rounded to fp16, and k, both fp32.
    """
    # Scales of groups that are all zero do not matter.
    scale_NG = torch.where(energy_NG > 0, scale_NG.float(), 0.0)
    extreme = scale_NG.gather(1, scale_NG.abs().argmax(1, keepdim=True))
    best_error = torch.full_like(extreme, torch.inf)
    best_d, best_k = torch.zeros_like(extreme), torch.zeros_like(scale_NG)
    for reached in [limit * share for limit in (least, most) if limit for share in _SHARES]:
        d = (extreme / reached).half().float()
        for _ in range(2):
            k_NG = _nearest(scale_NG, d, least, most)
            error = (energy_NG * (d * k_NG - scale_NG).square()).sum(1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_d, best_k = torch.where(better, d, best_d), torch.where(better, k_NG, best_k)
            squares = (energy_NG * k_NG.square()).sum(1, keepdim=True)
            d = torch.where(squares > 0, (energy_NG * k_NG * scale_NG).sum(1, keepdim=True) / squares, 0.0)
            d = d.half().float()
    return best_d, best_k


def fitted_offsets(
    scale_NG: Tensor, offset_NG: Tensor, moments: tuple[Tensor, Tensor, Tensor], most: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d, k, c, m for values q s - o of codes q: first the scales as if offsets followed freely, then the offsets.

    With n = sum 1, a = sum q, b = sum q^2 over a group (weighted, if weights are), the error of a scale d k whose
    offset is the best for it is (b - a^2 / n) (d k - s)^2, at the offset o + (a / n) (d k - s); c m is fitted to that,
    with n.

    Args:
        moments: n, a, b, all [N, G].
        most: bound of k and m; both are 0 at least.

    Returns:
        As `fitted_units`, of the scales and of the offsets.
    """
    total_NG, first_NG, second_NG = moments
    mean_NG = first_NG / total_NG.clamp(min=torch.finfo(torch.float32).tiny)
    free_NG = (second_NG - first_NG * mean_NG).clamp(min=0)
    # Groups of a single code have no scale of their own: whatever it is, the offset makes up for it.
    d, k_NG = fitted_units(scale_NG.clamp(min=0), free_NG, 0, most)
    wanted_NG = (offset_NG + mean_NG * (d * k_NG - scale_NG)).clamp(min=0)
    c, m_NG = fitted_units(wanted_NG, total_NG, 0, most)
    return d, k_NG, c, m_NG


def snapped(value: Tensor, unit: Tensor, least: int, most: int) -> Tensor:
    """The multiple of `unit` nearest to `value`."""
    return unit * _nearest(value, unit, least, most)


def _nearest(value: Tensor, unit: Tensor, least: int, most: int) -> Tensor:
    # + 0.0: no negative zeros, which are other bytes.
    return torch.where(unit != 0, value / unit, 0.0).round().clamp(least, most) + 0.0
