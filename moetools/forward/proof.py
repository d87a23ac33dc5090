"""A family of which the trial could not tell how its layers are called is compared with stock's own forward."""

import warnings
from typing import TYPE_CHECKING

import torch

from moetools.errors import UnsupportedModelError
from moetools.forward.memory import module_bytes
from moetools.text.tokens import TokenBatch

if TYPE_CHECKING:
    from moetools.forward.streaming import StreamedModel

_IDS = (2, 8)
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def compare_with_stock(model: "StreamedModel") -> None:
    """Run one small batch layer by layer and through the whole model; where it does not fit into memory, say so.

    Raises:
        UnsupportedModelError: the logits differ by more than rounding.
    """
    stock, problem = model.stock, model.stock.flow.problem
    what = f"model_type '{model.arch.model_type}': its layers could not be tried without weights ({problem})"
    if module_bytes(stock.model, model.dtype) > model.memory_budget:
        warnings.warn(f"{what}, and it is too large to be compared with stock's own forward", stacklevel=2)
        return
    ids = torch.randint(model.vocab_size, _IDS, generator=torch.Generator().manual_seed(0)).to(model.device)
    batch = TokenBatch(input_ids=ids, attention_mask=None, task=torch.zeros(len(ids), dtype=torch.long))
    with torch.inference_mode():
        layers = [stock.fill_layer(index, stock.read_layer(index)) for index in range(model.num_layers)]
        expected = stock.model(input_ids=ids, use_cache=False).logits.float()
        hidden, _ = model.skeleton.enter(batch)
        for index, layer in enumerate(layers):
            hidden = model.skeleton.run(layer, index, batch, hidden)
        found = model.skeleton.logits(batch, hidden).float()
        for index in range(model.num_layers):
            stock.free_layer(index)
    off = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if off > _TOLERANCE[model.dtype]:
        raise UnsupportedModelError(
            f"{what}, and run layer by layer its logits are not those of stock's own forward (off by {off:.1e})",
            hint="this model cannot be handled",
        )
