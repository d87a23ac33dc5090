"""Two checkpoints of one model over the same tokens, layer by layer beside each other: which experts both choose."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from moetools.errors import UserError
from moetools.forward.progress import announced
from moetools.forward.streaming import LayerObserver, StreamedModel
from moetools.forward.uneven import refuse_uneven
from moetools.statistics.base import RoutedBatch
from moetools.text.tokens import TokenData


@dataclass(frozen=True, kw_only=True)
class CommonChoices:
    """Slots that two models have in common, in the order of the data's sequences.

    Attributes:
        layers: decoder layer -> per sequence, the sum over its tokens of |experts of one & experts of the other|.
        slots: tokens * K of every sequence.
        task: its task.
    """

    layers: Mapping[int, Int[Tensor, "S"]]
    slots: Int[Tensor, "S"]
    task: Int[Tensor, "S"]


def check_comparable(model: StreamedModel, other: StreamedModel, data: TokenData) -> None:
    """Whether the experts of two models can be compared one by one.

    Raises:
        UserError: other layers, experts or top-k, or tokens that the other model does not know.
    """
    for one in (model, other):
        refuse_uneven(one.config, "comparing routers")
    if not other.stock.moe_layers:
        raise UserError(
            f"{other.checkpoint.path} has no routers to compare", hint="name a checkpoint of the same model"
        )
    sizes = [(sorted(one.stock.moe_layers), one.layer_shape(1)) for one in (model, other)]
    kinds = [(layers, shape.num_experts, shape.top_k) for layers, shape in sizes]
    if kinds[0] != kinds[1]:
        said = [f"{len(layers)} MoE layers of {experts} experts, top-{top_k}" for layers, experts, top_k in kinds]
        raise UserError(
            f"{other.checkpoint.path} has {said[1]}, {model.checkpoint.path} has {said[0]}",
            hint="`compare` is for checkpoints of one model, such as before and after training",
        )
    largest = max(int(batch.input_ids.max()) for batch in data.batches)
    if largest >= other.vocab_size:
        raise UserError(f"{other.checkpoint.path} embeds {other.vocab_size} tokens, and the text has id {largest}")


def common_choices(model: StreamedModel, other: StreamedModel, data: TokenData) -> CommonChoices:
    """One pass of both models, which take turns, layer by layer.

    Raises:
        UserError: a memory budget that is too small for a layer of each.
    """
    plan = model.memory_plan(data.batches, beside=(other,), rooms=2)
    plan.check()
    models = (model, other)
    batches = [model.on_device(batch) for batch in data.batches]
    firsts = torch.tensor([0, *(len(batch.task) for batch in batches)]).cumsum(0).tolist()
    layers: dict[int, Tensor] = {}
    with announced(model, "comparing routers", 2 * data.num_tokens) as progress, torch.inference_mode():
        streams = [one.activations(batches, plan) for one in models]
        for one, activations in zip(models, streams, strict=True):
            one.embed(batches, activations)
        pairs = zip(model.layers(prefetch=plan.prefetch), other.layers(prefetch=False), strict=True)
        for loaded in pairs:
            index = loaded[0].index
            progress.layer(index)
            common_S = torch.zeros(data.num_sequences, dtype=torch.int64, device=model.device)
            for number, batch in enumerate(batches):
                seen: list[RoutedBatch] = []
                for one, layer, activations in zip(models, loaded, streams, strict=True):
                    observer = LayerObserver(seen.append)
                    observer.batch, observer.first = batch, firsts[number]
                    with one.observe(layer, frozenset(), observer):
                        activations[number] = one.run_layer(layer, batch, activations[number])
                    progress.advance(batch.num_tokens)
                if seen:
                    _add_common(common_S, *seen)
            if index in model.stock.moe_layers:
                layers[index] = common_S.cpu()
    lengths = [_lengths(batch.input_ids, batch.attention_mask) for batch in data.batches]
    return CommonChoices(
        layers=layers,
        slots=torch.cat(lengths) * model.layer_shape(1).top_k,
        task=torch.cat([batch.task for batch in data.batches]),
    )


def _add_common(common_S: Tensor, one: RoutedBatch, other: RoutedBatch) -> None:
    assert one.sequence_T is not None
    both_TKK = one.topk_index_TK[:, :, None] == other.topk_index_TK[:, None]
    common_S.index_add_(0, one.sequence_T, both_TKK.sum((1, 2)))


def _lengths(ids_BN: Tensor, mask_BN: Tensor | None) -> Tensor:
    return torch.full((len(ids_BN),), ids_BN.shape[1]) if mask_BN is None else mask_BN.sum(1)
