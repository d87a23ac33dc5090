"""Run calibration tokens through a model, collect statistics of every MoE layer, save them and take them up again."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from moetools.checkpoint.output import check_file
from moetools.checkpoint.tensor_file import open_tensor_file
from moetools.errors import CheckpointError, StatisticsError, UserError
from moetools.forward.memory import MemoryPlan
from moetools.forward.progress import announced
from moetools.forward.streaming import LayerObserver, StreamedModel
from moetools.forward.uneven import refuse_uneven
from moetools.plugins import load_plugin, plugin_names
from moetools.statistics.base import LayerShape, Reads, RoutedBatch, Scoring, State, Statistic
from moetools.text.tokens import TokenBatch, TokenData

_FORMAT = "moetools-statistics-1"
_AGAIN = "give `data` instead of `stats`, to measure again"
_EXPERT = torch.int32
"""How the choices of a layer are kept for the next one."""
_LARGEST = 2**20
"""Of experts, tasks or widths that a statistics file may speak of."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What saved statistics were measured on; all of it must match before they are used again.

    Attributes:
        model: fingerprint of the checkpoint.
        data: fingerprint of the token batches, which covers tokenizer, sequence length, samples and seed.
        tasks: names, in order.
        dtype: compute dtype of the pass.
        num_tokens: real tokens seen.
    """

    model: str
    data: str
    tasks: tuple[str, ...]
    dtype: str
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class ModelStatistics:
    """Accumulators of every MoE layer.

    Attributes:
        layers: decoder layer index -> statistic name -> accumulators.
        token_ids: those that statistics tell apart, the most frequent first (`RoutedBatch.word_T`); empty if none does.
    """

    provenance: Provenance
    shape: LayerShape
    layers: Mapping[int, Mapping[str, State]]
    token_ids: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Statistics that every layer has."""
        return tuple(sorted(next(iter(self.layers.values()))))

    def finalized(self, layer: int) -> dict[str, State]:
        """Quantities of one layer, as methods and reports read them.

        Raises:
            StatisticsError: the statistics lack this layer.
        """
        if layer not in self.layers:
            raise StatisticsError(f"the statistics lack layer {layer}", hint=_AGAIN)
        return {name: load_statistic(name).finalize(dict(state)) for name, state in self.layers[layer].items()}

    def save(self, file: Path) -> None:
        """Write all accumulators and the provenance to one safetensors file."""
        tensors = {
            f"{layer}.{name}.{key}": tensor.contiguous().cpu()
            for layer, statistics in self.layers.items()
            for name, state in statistics.items()
            for key, tensor in state.items()
        }
        metadata = {
            "format": _FORMAT,
            "provenance": json.dumps(asdict(self.provenance)),
            "shape": json.dumps(asdict(self.shape)),
            "token_ids": json.dumps(self.token_ids),
        }
        staged = file.with_name(f".{file.name}.partial")
        save_file(tensors, str(staged), metadata=metadata)
        staged.replace(file)


def load_statistic(name: str) -> Statistic:
    """The statistic plug-in `name`."""
    return load_plugin("moetools.statistics", name, kind="statistic").STATISTIC


def load_statistics(file: Path) -> ModelStatistics:
    """Statistics saved by `ModelStatistics.save`.

    Raises:
        StatisticsError: the file is missing, damaged or of another kind.
    """
    layers: dict[int, dict[str, State]] = {}
    try:
        stored = open_tensor_file(file)
        if stored.metadata.get("format") != _FORMAT:
            raise StatisticsError(f"{file} is not a statistics file", hint=_AGAIN)
        for key, tensor in stored.read(sorted(stored.tensors)).items():
            layer, name, quantity = key.split(".")
            layers.setdefault(int(layer), {}).setdefault(name, {})[quantity] = tensor
        known = json.loads(stored.metadata["provenance"])
        provenance = Provenance(**{**known, "tasks": tuple(known["tasks"])})
        shape = LayerShape(**json.loads(stored.metadata["shape"]))
        # Files from before there was such a thing lack it.
        token_ids = tuple(json.loads(stored.metadata.get("token_ids", "[]")))
    except CheckpointError as error:
        raise StatisticsError(f"{file}: cannot be read as statistics: {error.message}", hint=_AGAIN) from error
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise StatisticsError(f"{file}: cannot be read as statistics: {error}", hint=_AGAIN) from error
    if not layers:
        raise StatisticsError(f"{file} holds no statistics", hint=_AGAIN)
    ordered = dict(sorted(layers.items()))
    found = ModelStatistics(provenance=provenance, shape=shape, layers=ordered, token_ids=token_ids)
    fault = _fault(found)
    if fault:
        raise StatisticsError(f"{file} is damaged: {fault}", hint=_AGAIN)
    return found


def check_saving(stats: Path | None, save_stats: Path | None, *, has_data: bool) -> None:
    """Whether statistics can be saved to `save_stats`, before any are measured.

    Raises:
        UserError: they are saved already, nothing to measure, no such folder, or the file is something else.
    """
    if save_stats is None:
        return
    if stats is not None:
        raise UserError("`stats` and `save_stats` together: the statistics are saved already")
    if not has_data:
        raise UserError("`save_stats` needs `data` to measure something")
    check_file("save_stats", save_stats)
    if save_stats.exists() and not _is_statistics(save_stats):
        raise UserError(f"`save_stats`: '{save_stats}' exists and holds no statistics", hint="choose another name")


def _is_statistics(file: Path) -> bool:
    try:
        return open_tensor_file(file).metadata.get("format") == _FORMAT
    except CheckpointError:
        return False


def _fault(statistics: ModelStatistics) -> str | None:
    """What no measurement gives: values of wrong types, other tensors than the statistics have, impossible numbers."""
    known, shape = statistics.provenance, statistics.shape
    texts = (known.model, known.data, known.dtype, *known.tasks)
    if not all(isinstance(text, str) for text in texts) or type(known.num_tokens) is not int or known.num_tokens < 0:
        return f"provenance {known}"
    sizes = [value for value in vars(shape).values() if value is not shape.scoring]
    if any(type(size) is not int or not 1 <= size <= _LARGEST for size in sizes):
        return f"shape {shape}"
    if shape.scoring not in get_args(Scoring) or shape.num_tasks != max(1, len(known.tasks)):
        return f"{len(known.tasks)} tasks, {shape}"
    ids = statistics.token_ids
    if shape.num_words != 1 + len(ids) or any(type(one) is not int or one < 0 for one in ids):
        return f"{len(ids)} token ids, {shape}"
    for layer, states in statistics.layers.items():
        if layer < 0 or set(states) != set(statistics.names):
            return f"layer {layer} has {', '.join(states)}, not {', '.join(statistics.names)}"
        for name, state in states.items():
            fault = _state_fault(name, state, shape)
            if fault:
                return f"layer {layer}, {name}: {fault}"
    return None


def _state_fault(name: str, state: State, shape: LayerShape) -> str | None:
    if name.replace("_", "-") not in plugin_names("moetools.statistics"):
        return "no such statistic"
    expected = load_statistic(name).init(shape, torch.device("meta"))
    if state.keys() != expected.keys():
        return f"{', '.join(state)} instead of {', '.join(expected)}"
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape or tensor.dtype != expected[key].dtype:
            return (
                f"{key} is {tensor.dtype} {list(tensor.shape)}, not {expected[key].dtype} {list(expected[key].shape)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"{key} has a number that is not finite"
        if not tensor.is_floating_point() and tensor.numel() and int(tensor.min()) < 0:
            return f"{key} counts {int(tensor.min())}"
    return None


def check_statistics(
    statistics: ModelStatistics,
    *,
    model: str,
    needs: Iterable[str],
    data: str | None = None,
    num_experts: int | None = None,
) -> None:
    """Refuse statistics of another model or other data, or without what a method needs.

    Args:
        model: fingerprint of the checkpoint at hand.
        needs: names of statistics.
        data: fingerprint of the data at hand, if data was given too.
        num_experts: of the model's layers.

    Raises:
        StatisticsError: saying which of these does not match.
    """
    known = statistics.provenance
    if known.model != model:
        raise StatisticsError(
            f"the statistics were measured on another model (fingerprint {known.model[:12]}, this one is {model[:12]})",
            hint=_AGAIN,
        )
    if data is not None and known.data != data:
        raise StatisticsError(
            f"the statistics were measured on other tokens (fingerprint {known.data[:12]}, `data` gives {data[:12]})",
            hint="leave `data` out to use them as they are, or `stats` to measure again",
        )
    if num_experts is not None and statistics.shape.num_experts != num_experts:
        message = f"the statistics are of {statistics.shape.num_experts} experts per layer, the model has {num_experts}"
        raise StatisticsError(message, hint=_AGAIN)
    missing = [name for name in needs if name not in statistics.names]
    if missing:
        raise StatisticsError(
            f"the statistics lack {', '.join(missing)}; they have {', '.join(statistics.names)}",
            hint=_AGAIN,
        )


def statistics_bytes(names: Iterable[str], shape: LayerShape) -> int:
    """Of one layer's accumulators."""
    states = [load_statistic(name).init(shape, torch.device("meta")) for name in sorted(set(names))]
    return sum(tensor.nbytes for state in states for tensor in state.values())


def calibration_plan(model: StreamedModel, data: TokenData, names: Iterable[str]) -> MemoryPlan:
    """Where the bytes of `collect_statistics` go; what was measured of all layers is kept."""
    shape = _shape(model, data, frequent_ids(data, model.layer_shape(1).num_experts))
    kept = statistics_bytes(names, shape) * (1 + len(model.stock.moe_layers))
    if "previous" in _reads(names):
        kept += 2 * data.num_tokens * shape.top_k * _EXPERT.itemsize
    if "word" in _reads(names):
        kept += data.num_tokens * 8
    return model.memory_plan(data.batches, scratch=kept)


def _shape(model: StreamedModel, data: TokenData, ids: Sequence[int]) -> LayerShape:
    shape = model.layer_shape(len(data.tasks))
    return replace(shape, num_sequences=data.num_sequences, num_words=1 + len(ids))


def _reads(names: Iterable[str]) -> frozenset[Reads]:
    return frozenset().union(*(load_statistic(name).reads for name in names))


def frequent_ids(data: TokenData, num_experts: int) -> tuple[int, ...]:
    """The token ids that statistics tell apart: the most frequent ones, so many that ids * experts is at most 2^15.

    At most 512 and at least 16; equally frequent ones in ascending order.
    """
    real = [
        batch.input_ids.flatten() if batch.attention_mask is None else batch.input_ids[batch.attention_mask]
        for batch in data.batches
    ]
    ids, counts = torch.cat(real).cpu().unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[: max(16, min(512, 2**15 // num_experts))]
    return tuple(ids[order].tolist())


class _Memory:
    """What statistics know of a batch beside its layer, if they read it: choices of the MoE layer before, frequent ids.

    Set `number` before each batch goes through a layer.
    """

    def __init__(self, reads: frozenset[Reads], batches: Sequence[TokenBatch], ids: Sequence[int]) -> None:
        self._reads, self._batches, self._ids = reads, batches, ids
        self._choices: dict[int, Tensor] = {}
        self._words: dict[int, Tensor] = {}
        self.number = 0

    def recall(self, batch: RoutedBatch) -> RoutedBatch:
        """The batch called `number` with what is known of it; its own choices are kept for the next layer."""
        if "word" in self._reads:
            if self.number not in self._words:
                self._words[self.number] = self._ranks(self._batches[self.number])
            batch = replace(batch, word_T=self._words[self.number])
        if "previous" in self._reads:
            batch = replace(batch, previous_TK=self._choices.get(self.number))
            self._choices[self.number] = batch.topk_index_TK.to(_EXPERT)
        return batch

    def _ranks(self, batch: TokenBatch) -> Tensor:
        ids_T = batch.input_ids.flatten() if batch.attention_mask is None else batch.input_ids[batch.attention_mask]
        known = torch.tensor(self._ids, device=ids_T.device)
        ascending, order = known.sort()
        place_T = torch.searchsorted(ascending, ids_T).clamp(max=len(known) - 1)
        return torch.where(ascending[place_T] == ids_T, order[place_T], len(known))


def collect_statistics(
    model: StreamedModel, data: TokenData, names: Sequence[str], plan: MemoryPlan | None = None
) -> ModelStatistics:
    """One streamed pass over `data`, measuring the statistics `names` in every MoE layer.

    Tokens go through the model exactly as in stock transformers; expert activations are recorded only if a statistic
    reads them.

    Args:
        plan: of the run this is a part of; that of the pass alone if not given.

    Raises:
        UserError: a memory budget that is too small.
    """
    refuse_uneven(model.config, "measuring statistics")
    statistics = {name: load_statistic(name) for name in sorted(set(names))}
    reads = _reads(names)
    ids = frequent_ids(data, model.layer_shape(1).num_experts) if "word" in reads else ()
    shape = _shape(model, data, ids)
    batches = [model.on_device(batch) for batch in data.batches]
    memory = _Memory(reads, batches, ids)
    if plan is None:
        plan = calibration_plan(model, data, names)
        plan.check()
    layers: dict[int, dict[str, State]] = {}
    with announced(model, "calibrating", data.num_tokens) as progress, torch.inference_mode():
        activations = model.activations(batches, plan)
        model.embed(batches, activations)
        last = max(model.stock.moe_layers)
        for layer in model.layers(resident=plan.resident, prefetch=plan.prefetch):
            progress.layer(layer.index)
            states = {name: statistic.init(shape, model.device) for name, statistic in statistics.items()}
            observer = LayerObserver(_updater(statistics, states, memory))
            with model.observe(layer, reads, observer):
                for number, batch in enumerate(batches):
                    observer.batch, observer.first = batch, sum(len(one.task) for one in batches[:number])
                    memory.number = number
                    activations[number] = model.run_layer(layer, batch, activations[number])
                    progress.advance(batch.num_tokens)
            if layer.index in model.stock.moe_layers:
                layers[layer.index] = {name: _on_cpu(state) for name, state in states.items()}
            if layer.index == last:
                break
    provenance = Provenance(
        model=model.checkpoint.fingerprint(),
        data=data.fingerprint,
        tasks=data.tasks,
        dtype=str(model.dtype).removeprefix("torch."),
        num_tokens=data.num_tokens,
    )
    return ModelStatistics(provenance=provenance, shape=shape, layers=layers, token_ids=ids)


def _updater(statistics: Mapping[str, Statistic], states: Mapping[str, State], memory: _Memory) -> Any:
    def update(batch: RoutedBatch) -> None:
        batch = memory.recall(batch)
        for name, statistic in statistics.items():
            statistic.update(states[name], batch)

    return update


def _on_cpu(state: State) -> dict[str, Tensor]:
    return {key: tensor.cpu().clone() for key, tensor in state.items()}
