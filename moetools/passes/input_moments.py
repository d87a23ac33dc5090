"""What every linear layer and every routed expert of a model sees: sums of squares of its inputs, from one pass."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from moetools.checkpoint.tensor_file import open_tensor_file
from moetools.forward.memory import MemoryPlan
from moetools.forward.progress import announced
from moetools.forward.streaming import LayerObserver, LoadedLayer, StreamedModel
from moetools.methods.blending import blend_moments
from moetools.passes.quantize_places import Place
from moetools.statistics.base import RoutedBatch
from moetools.text.tokens import TokenBatch, TokenData


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Second moments of what B matrices with I columns see: those of all experts of a layer, or one.

    Attributes:
        sum_BI: sum over tokens of x_i^2, fp32; not weighted by the routing weight.
        count_B: tokens, of an expert those routed to it.
    """

    sum_BI: Float[Tensor, "B I"]
    count_B: Int[Tensor, "B"]


def moments_key(place: Place) -> str:
    """Under which `measure_moments` has what a tensor sees: the experts of a layer share theirs."""
    if place.expert is None:
        return place.name
    return f"{place.layer}.{'down' if place.expert.projection == 'down' else 'wide'}"


def measure_moments(
    model: StreamedModel, data: TokenData, plan: MemoryPlan, places: Mapping[int | None, Sequence[Place]]
) -> dict[str, Moments]:
    """One streamed pass of the model over `data`; padding is left out.

    Args:
        plan: of the run this is a part of.
        places: of every decoder layer, what is to be measured.

    Returns:
        By `moments_key`. Experts that share their inputs (gate, up) lean on their layer where they are rare, as in
        quantization (`blend_moments`); of the layer's mean, an expert without tokens has one token's worth.
    """
    batches = [model.on_device(batch) for batch in data.batches]
    found: dict[str, Moments] = {}
    with announced(model, "calibrating", data.num_tokens) as progress, torch.no_grad():
        activations = model.activations(batches, plan)
        model.embed(batches, activations)
        for layer in model.layers(prefetch=plan.prefetch):
            progress.layer(layer.index)
            sums = _Sums()
            with _watched(model, layer, places[layer.index], sums):
                for number, batch in enumerate(batches):
                    sums.next(batch)
                    activations[number] = model.run_layer(layer, batch, activations[number])
                    progress.advance(batch.num_tokens)
            found |= sums.results()
    return found


def moments_bytes(places: Iterable[Place], num_experts: int) -> int:
    """Of what `measure_moments` keeps."""
    columns = {moments_key(place): (place.shape[1], num_experts if place.expert else 1) for place in places}
    return sum(4 * width * count + 8 * count for width, count in columns.values())


def save_moments(moments: Mapping[str, Moments], file: Path) -> None:
    """Write a safetensors file for `load_moments`."""
    tensors = {f"{key}|sum": one.sum_BI.contiguous() for key, one in moments.items()}
    save_file({**tensors, **{f"{key}|count": one.count_B for key, one in moments.items()}}, str(file))


def load_moments(file: Path) -> dict[str, Moments]:
    """What `save_moments` has written."""
    stored = open_tensor_file(file)
    tensors = stored.read(sorted(stored.tensors))
    keys = sorted({name.rpartition("|")[0] for name in tensors})
    return {key: Moments(sum_BI=tensors[f"{key}|sum"], count_B=tensors[f"{key}|count"]) for key in keys}


@contextlib.contextmanager
def _watched(model: StreamedModel, layer: LoadedLayer, places: Sequence[Place], sums: "_Sums") -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for place in places:
            if place.path is not None:
                stack.callback(sums.watch(place.name, layer.module.get_submodule(place.path)))
        if any(place.expert is not None for place in places):
            sums.observer = LayerObserver(lambda batch: sums.see_experts(layer.index, batch))
            stack.enter_context(model.observe(layer, frozenset({"intermediate"}), sums.observer))
        yield


class _Sums:
    """Adds up one layer's squares, in fp32 per batch and fp64 over batches."""

    def __init__(self) -> None:
        self.observer: LayerObserver | None = None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._real_T: Tensor | None = None

    def next(self, batch: TokenBatch) -> None:
        """What follows belongs to `batch`."""
        self._real_T = None if batch.attention_mask is None else batch.attention_mask.reshape(-1)
        if self.observer is not None:
            self.observer.batch = batch

    def watch(self, key: str, module: nn.Module) -> Callable[[], None]:
        """Until the function that is returned is called."""
        return module.register_forward_pre_hook(lambda _module, args: self._see(key, args[0])).remove

    def _see(self, key: str, seen: Tensor) -> None:
        rows = seen.flatten(0, -2)
        rows = rows if self._real_T is None else rows[self._real_T]
        self._add(key, rows.float().square().sum(0)[None], torch.tensor([len(rows)]))

    def see_experts(self, layer: int, batch: RoutedBatch) -> None:
        """Inputs of gate and up, and of down, by expert."""
        slots = batch.slots
        assert slots.intermediate_SF is not None
        chosen_ET = batch.hidden_TD.new_zeros(len(slots.counts_E), len(batch.hidden_TD), dtype=torch.float32)
        chosen_ET[slots.expert_S, slots.token_S] = 1.0
        self._add(f"{layer}.wide", chosen_ET @ batch.hidden_TD.float().square(), slots.counts_E)
        self._add(f"{layer}.down", slots.sum_by_expert(slots.intermediate_SF.float().square()), slots.counts_E)

    def _add(self, key: str, sum_BI: Tensor, count_B: Tensor) -> None:
        if key in self._sums:
            self._sums[key] += sum_BI
            self._counts[key] += count_B
        else:
            self._sums[key], self._counts[key] = sum_BI.double(), count_B.clone()

    def results(self) -> dict[str, Moments]:
        found = {}
        for key, sum_BI in self._sums.items():
            count_B = self._counts[key]
            if key.endswith(".wide"):
                mean_BI = blend_moments(sum_BI / count_B.clamp(min=1)[:, None], count_B)
                count_B = count_B.clamp(min=1)
                sum_BI = mean_BI * count_B[:, None]
            found[key] = Moments(sum_BI=sum_BI.float().cpu(), count_B=count_B.cpu())
        return found
