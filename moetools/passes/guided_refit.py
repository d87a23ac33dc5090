"""Down projections solved behind rounded gates and ups, towards the model that the quantized one was made of.

Per layer: min over W of sum_t ||R_t - (A W)_t||^2 + lambda ||W - W0||^2, R_t = h_reference - h_without the hidden
states of the reference behind the layer less those of the quantized stream without what its routed experts add, A the
gated intermediates of the rounded gates and ups on that stream (`methods.joint_refit`). R holds what all earlier layers
lost, rounding and fewer experts alike, so later layers repair it. The solved W is rounded afterwards.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.architectures.weights import LayerWeights, stack_experts
from moetools.forward.activations import Activations
from moetools.forward.memory import MemoryPlan
from moetools.forward.streaming import LoadedLayer, StreamedModel
from moetools.methods.joint_refit import JointSolver, RefitBounds
from moetools.passes.layer_equations import Activate, chosen_rows, first_sequences
from moetools.passes.layer_features import LayerFeatures, Routes
from moetools.text.tokens import TokenBatch

_LEAST_SHARE = 32


class Guide:
    """The reference's hidden states, a layer at a time.

    Args:
        model: the reference.
        batches: on the device.

    Attributes:
        before: hidden states behind the layer that was run last.
    """

    before: Activations

    def __init__(self, model: StreamedModel, batches: Sequence[TokenBatch], plan: MemoryPlan) -> None:
        self.model, self._batches, self._plan = model, batches, plan
        self._layers: Generator[LoadedLayer] | None = None

    def start(self) -> None:
        """Put the embeddings of all tokens in place."""
        self.before = self.model.activations(self._batches, self._plan)
        self.model.embed(self._batches, self.before)
        self._layers = self.model.layers(prefetch=self._plan.prefetch)

    def advance(self) -> None:
        """Run the next layer."""
        assert self._layers is not None, "started"
        layer = next(self._layers)
        for number, batch in enumerate(self._batches):
            self.before[number] = self.model.run_layer(layer, batch, self.before[number])

    def close(self) -> None:
        """Free the layer that was run last."""
        if self._layers is not None:
            self._layers.close()


@dataclass(frozen=True, kw_only=True)
class GuidedStreams:
    """What a layer's problem is made of; see `layer_features.Streams`.

    Attributes:
        original: the model whose stream it is.
        inputs: what its experts see, by batch [B, N, D].
        without: the hidden states behind the layer without what they add.
        before: those of the reference, behind the layer.
        scale: factor of what the layer adds to its residual stream.
    """

    original: StreamedModel
    batches: Sequence[TokenBatch]
    inputs: Activations
    without: Activations
    before: Activations
    scale: float

    def wanted(self, number: int) -> Float[Tensor, "T D"]:
        """What the experts should add for each token of a batch, fp32."""
        before, without = (room[number].to(self.original.device).float() for room in (self.before, self.without))
        return (before - without).flatten(0, 1) / self.scale

    def rows(self, number: int, held: bool) -> Tensor:
        """Flat mask of the real tokens of a batch that are (not) held out."""
        return chosen_rows(self.batches[number], first_sequences(self.batches)[number], held)


def refit_down(
    streams: GuidedStreams, routes: Mapping[int, Routes], weights: LayerWeights, activate: Activate, plan: MemoryPlan
) -> LayerWeights:
    """The layer with new down projections, solved as the formula of this module says."""
    experts = [stack_experts(weights, (expert,)) for expert in range(weights.num_experts)]
    bounds = RefitBounds(nbytes=max(plan.spare // 4, plan.scratch // _LEAST_SHARE))
    problem = LayerFeatures(streams, routes, experts, activate, nbytes=plan.spare // 2)
    solver = JointSolver(problem, torch.cat([expert.down_DW.T for expert in experts]), bounds)
    refit = solver.finish(solver.search())
    pieces = refit.down_ND.split([expert.width for expert in experts])
    return replace(weights, down_EDF=torch.stack([piece.T for piece in pieces]).to(weights.down_EDF.dtype))
