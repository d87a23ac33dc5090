"""How alike the experts of a layer are by their weights and by their router rows; no text is needed.

Letters: E experts, D hidden size, M weights of one expert.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.forward.progress import announced
from moetools.forward.streaming import StreamedModel

_COLUMNS = 1 << 20
_FFN = ("gate_EFD", "up_EFD", "down_EDF")


@dataclass(frozen=True, kw_only=True)
class WeightsAlike:
    """One layer.

    Attributes:
        weights_EE: cosine of the experts' gate, up and down matrices, all M weights of an expert as one vector. Experts
            that compute the same with their neurons in another order are not alike by it.
        router_EE: cosine of the router's rows less their mean: a part that all rows share shifts all logits alike.
    """

    weights_EE: Float[Tensor, "E E"]
    router_EE: Float[Tensor, "E E"]


def weights_alike(model: StreamedModel) -> dict[int, WeightsAlike]:
    """Of every MoE layer, by its index; layers are read one at a time and are not run."""
    found = {}
    with announced(model, "comparing weights") as progress, torch.inference_mode():
        for layer in model.layers(keep_native=True, fill=False, prefetch=False):
            progress.layer(layer.index)
            if layer.index in model.stock.moe_layers:
                found[layer.index] = layer_alike(model.weights(layer))
    return found


def layer_alike(weights: LayerWeights) -> WeightsAlike:
    """Of the weights of one layer."""
    tensors = weights.tensors()
    rows_ED = weights.router_ED.double()
    return WeightsAlike(
        weights_EE=_cosine(tensors[name].flatten(1) for name in _FFN if name in tensors),
        router_EE=_cosine([rows_ED - rows_ED.mean(0)]),
    )


def _cosine(parts_EM: Iterable[Tensor]) -> Tensor:
    """Of vectors that come in parts; 0 for a vector of zeros. Products in fp32, their sums in fp64."""
    gram_EE: Tensor | float = 0.0
    for part_EM in parts_EM:
        for piece_EM in part_EM.split(_COLUMNS, dim=1):
            wide_EM = piece_EM if piece_EM.dtype == torch.float64 else piece_EM.float()
            gram_EE = gram_EE + (wide_EM @ wide_EM.T).double().cpu()
    assert isinstance(gram_EE, Tensor)
    norm_E = gram_EE.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return gram_EE / norm_E[:, None] / norm_E
