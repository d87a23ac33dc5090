"""Plain mean of all experts' weights."""

import torch

from moetools.architectures.weights import WideExpert
from moetools.methods.distill.base import DenseInit, MoeView, averaged


class Mean(DenseInit):
    """W = mean_e W_e for gate, up and down, the output scaled by the mean total routing weight.

    The mean has one expert's F neurons; further ones start with a zero down projection, and where fewer are asked for
    the largest stay. Source: OneS (arXiv 2201.10890, section 3, "averaging").
    """

    name = "mean"

    def build(self, view: MoeView) -> WideExpert:
        return averaged(view, view.weights, torch.ones(view.num_experts, dtype=torch.float64))


METHOD = Mean()
