"""Some experts of a packed layer as they lie on disk: nothing is decoded and packed again."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.formats.reader import PackedCheckpoint
from moetools.forward.stock import StockModel


def packed_layer(
    stock: StockModel,
    index: int,
    native: Mapping[str, Tensor],
    weights: LayerWeights,
    kept: Sequence[int],
    view: PackedCheckpoint,
    origin: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """One layer's tensors by name on disk when it has some of its experts: `StockModel.disk_tensors`, still packed.

    Experts' matrices, and whatever is beside the experts, are the input's bytes. Routers and biases are those of
    `weights`, which is a selection of the layer's.

    Args:
        kept: the old number of every new expert.
        view: the input.
        origin: name in the stock model's checkpoint -> name in `view`, where they differ.
    """
    moe, places = stock.moe_layers[index], stock.expert_tensors(index)
    fused = "gate_up_proj" if moe.layout.gated else "up_proj"
    matrices = [moe.inside(f"{stock.arch.experts}.{name}") for name in (fused, "down_proj")]
    changed, untouched = stock.changed_tensors(index, native, weights, without=matrices)

    def there(name: str) -> str:
        return name if origin is None else origin[name]

    found = view.read_stored(map(there, untouched))
    found |= {there(name): tensor for name, tensor in changed.items()}
    numbered = {(place.expert, place.projection): there(place.name) for place in places}
    for place in places:
        name = there(place.name)
        if place.expert is None:
            stacked = view.read_stored([name])
            found |= {disk: tensor.index_select(0, torch.tensor(kept)) for disk, tensor in stacked.items()}
        elif place.expert < len(kept):
            found |= _renamed(view, numbered[kept[place.expert], place.projection], name)
    return found


def _renamed(view: PackedCheckpoint, old: str, new: str) -> dict[str, Tensor]:
    """Tensor `old` and its parts under the names of `new`; a part's name begins with the module's."""
    before, after = old.removesuffix(".weight"), new.removesuffix(".weight")
    parts = view.read_stored([old]).items()
    return {after + disk.removeprefix(before): tensor for disk, tensor in parts}
