"""SVD-KG: the leading singular directions of every expert as neurons, side by side."""

import torch
from torch import Tensor

from moetools.architectures.weights import WideExpert, stack_experts
from moetools.methods.distill.base import DenseInit, MoeView, concatenate, fit_width


class SvdKG(DenseInit):
    """From each of E experts r = W / E rotated neurons: U_r^T [gate | up | down^T], with U S V^T its SVD.

    OneS (arXiv 2201.10890, section 3) takes the leading singular components of every expert's matrices. A gated neuron
    ties a gate row, an up row and a down column together, so one rotation U serves all three. The sign of a singular
    vector is free: it is chosen so that the rotated neurons' up and down parts agree with their largest source neuron.
    """

    name = "svd-kg"

    def build(self, view: MoeView) -> WideExpert:
        scale_E = view.expert_scale()
        quota, rest = divmod(view.width, view.num_experts)
        parts = []
        for expert in range(view.num_experts):
            count = quota + (expert < rest)
            if count:
                whole = stack_experts(view.weights, (expert,))
                parts.append(_leading(whole, min(count, whole.width)).scaled(scale_E[expert].item()))
        return fit_width(concatenate(parts, view.width), view.width, view.generator())


def _leading(ffn: WideExpert, count: int) -> WideExpert:
    pieces = [piece for piece in (ffn.gate_WD, ffn.up_WD, ffn.down_DW.T) if piece is not None]
    basis_WR = torch.linalg.svd(torch.cat(pieces, 1), full_matrices=False).U
    basis_WR = basis_WR[:, :count]
    peak_R = basis_WR.gather(0, basis_WR.abs().argmax(0, keepdim=True))[0]
    basis_WR = basis_WR * peak_R.sign()

    def rotated(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else basis_WR.T @ tensor

    return WideExpert(
        up_WD=basis_WR.T @ ffn.up_WD,
        down_DW=ffn.down_DW @ basis_WR,
        gate_WD=rotated(ffn.gate_WD),
        up_bias_W=rotated(ffn.up_bias_W),
        gate_bias_W=rotated(ffn.gate_bias_W),
        down_bias_D=ffn.down_bias_D,
    )


METHOD = SvdKG()
