"""Multi-token prediction (MTP): each module as a model of one layer behind the trunk, which drafts a further token.

Module d = 0, 1, ... joins the hidden state of position i with the embedding of the token d + 1 places on,

    x_i = W [enorm(e(t_{i+d+1})); hnorm(h_i^d)],    h^{d+1} = norm(layer(x)),
    draft of t_{i+d+2} = argmax head(h_i^{d+1}),

with h^0 the trunk's hidden states behind its final norm; embedding e and head are the trunk's. Source: DeepSeek-V3
(arXiv 2412.19437), section 2.2; transformers' `MtpModel` computes the same.

Letters: B sequences of a batch, N positions, D model width.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moetools.architectures.base import PREDICTION_KEYS, Architecture, find_architecture
from moetools.architectures.mtp import MtpTensors
from moetools.checkpoint.renamed import RenamedCheckpoint, renamed
from moetools.errors import UnsupportedModelError
from moetools.forward.activations import Activations
from moetools.forward.memory import MemoryPlan
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress, announced
from moetools.forward.streaming import LoadedLayer, StreamedModel
from moetools.text.tokens import TokenBatch, TokenData

_OWN = re.compile(r"(?:model\.)?mtp\.(?:layers\.(\d+)\.(.+)|(.+))")
_JOINING = {
    "enorm.weight": "enorm",
    "hnorm.weight": "hnorm",
    "eh_proj.weight": "eh_proj",
    "pre_fc_norm_embedding.weight": "enorm",
    "pre_fc_norm_hidden.weight": "hnorm",
    "fc.weight": "eh_proj",
}
_TRUNKS_OWN = ("embed_tokens.weight", "shared_head.head.weight")
"""Copies of the trunk's, which loaders take instead."""
_NORMS = ("shared_head.norm.weight", "norm.weight")
_ONE_LAYER: dict[str, Any] = {
    "first_k_dense_replace": 0,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "moe_layer_freq": 1,
    "mlp_layer_types": ["sparse"],
    **dict.fromkeys(PREDICTION_KEYS, 0),
}
"""Values of config.json that make the only layer a MoE layer."""


@dataclass(frozen=True, kw_only=True)
class MtpModule:
    """One module.

    Attributes:
        layer: its number behind the trunk's layers.
        checkpoint: its layer and final norm, with the trunk's embeddings and head, as a model of one layer.
        joining: "enorm", "hnorm" and "eh_proj" -> name on disk.
    """

    layer: int
    checkpoint: RenamedCheckpoint
    joining: Mapping[str, str]

    @property
    def layer_names(self) -> list[str]:
        """Names on disk of the layer's tensors."""
        return [old for new, old in self.checkpoint.origin.items() if re.search(r"(?:^|\.)layers\.0\.", new)]

    def config(self, experts: int) -> dict[str, Any]:
        """config.json of the model of one layer with so many experts."""
        config = self.checkpoint.config
        return find_architecture(config).with_expert_count(config, experts)


def find_modules(model: StreamedModel, tensors: MtpTensors) -> list[MtpModule]:
    """The MTP modules of a checkpoint, in the order in which they run.

    Raises:
        UnsupportedModelError: names or a config.json that are of no kind that is known here.
    """
    found = _names_by_module(model, tensors)
    text = model.arch.text(model.config)
    if "chain_hidden_post_norm" in text or not isinstance(getattr(model.stock.decoder, "norm", None), nn.Module):
        raise UnsupportedModelError("their norms are not of the kind that is known")
    return [_module(model, tensors, depth, names) for depth, names in sorted(found.items())]


def _names_by_module(model: StreamedModel, tensors: MtpTensors) -> dict[int, dict[str, str]]:
    """Depth -> name inside the module -> name on disk."""
    prefix = _layers_prefix(model)
    found: dict[int, dict[str, str]] = {}
    for name in tensors.names:
        own, behind = _OWN.fullmatch(name), re.fullmatch(rf"{re.escape(prefix)}(\d+)\.(.+)", name)
        if own:
            found.setdefault(int(own[1] or 0), {})[own[2] or own[3]] = name
        elif behind:
            found.setdefault(int(behind[1]) - model.num_layers, {})[behind[2]] = name
        else:
            raise UnsupportedModelError(f"'{name}' is of no kind that is known")
    return found


def _layers_prefix(model: StreamedModel) -> str:
    """What stands before the number in the names on disk of the trunk's layers."""
    names = (re.match(r"(.*?layers\.)0\.", name) for name in model.stock.names[0])
    prefixes = {found[1] for found in names if found}
    if len(prefixes) != 1:
        raise UnsupportedModelError("the trunk's layers are named in more than one way")
    return prefixes.pop()


def _module(model: StreamedModel, tensors: MtpTensors, depth: int, names: Mapping[str, str]) -> MtpModule:
    stock, prefix = model.stock, _layers_prefix(model)
    (norm,) = stock.stored_tensors(None, {f"{stock.decoder_path}.norm.weight": stock.decoder.norm.weight})
    origin = {name: name for name in stock.names[None]}
    joining = {}
    for inside, name in names.items():
        if inside in _JOINING:
            joining[_JOINING[inside]] = name
        elif inside in _NORMS:
            origin[norm] = name
        elif inside not in _TRUNKS_OWN:
            origin[f"{prefix}0.{inside}"] = name
    if len(joining) != 3 or origin[norm] == norm:
        raise UnsupportedModelError(f"module {depth} lacks what joins it to the trunk")
    config = _one_layer(model.arch, model.config, depth, tensors.experts)
    return MtpModule(
        layer=model.num_layers + depth, checkpoint=renamed(model.checkpoint, origin, config), joining=joining
    )


def _one_layer(arch: Architecture, config: Mapping[str, Any], depth: int, experts: int) -> dict[str, Any]:
    text = arch.text(config)
    changes = {key: value for key, value in _ONE_LAYER.items() if text.get(key) is not None}
    if "layer_types" in text or "full_attention_interval" in text:
        changes["layer_types"] = [(text.get("mtp_layer_types") or {depth: "full_attention"})[depth]]
    return arch.with_expert_count(arch.with_text(config, {**changes, "num_hidden_layers": 1}), experts)


class MtpModel(StreamedModel):
    """A module that runs: its layer is layer 0, and what enters that comes from the trunk.

    Its batches are those of the trunk without their first token (`shifted`), once for every module up to it.

    Args:
        experts: how many its layer is built for, if not as many as it has.
    """

    own_entry = True

    def __init__(
        self,
        module: MtpModule,
        options: ForwardOptions,
        *,
        experts: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        config = None if experts is None else module.config(experts)
        super().__init__(module.checkpoint, options, progress=progress, config=config)
        self.module = module
        self._before: Activations | None = None
        self._joint: tuple[nn.Module, nn.Module, Tensor] | None = None

    def behind(self, hidden: Activations) -> None:
        """Take what enters the layer from these hidden states, of the trunk or of the module before."""
        self._before = hidden

    def embed(self, batches: Sequence[TokenBatch], activations: Activations) -> None:
        for number, batch in enumerate(batches):
            activations[number] = self.join(self.on_device(batch), number)

    def join(self, batch: TokenBatch, number: int) -> Tensor:
        """x [B, N, D] of a batch."""
        assert self._before is not None, "the trunk runs first"
        embedded = self.skeleton.enter(batch)[0]
        enorm, hnorm, weight = self._joining()
        hidden = self._before[number][:, : embedded.shape[1]].to(self.device)
        parts = [enorm(embedded), hnorm(hidden)]
        if self.arch.text(self.config).get("mtp_hidden_states_first"):
            parts.reverse()
        return nn.functional.linear(torch.cat(parts, -1), weight)

    def _joining(self) -> tuple[nn.Module, nn.Module, Tensor]:
        if self._joint is None:
            names = self.module.joining
            stored = self.module.checkpoint.source.read(names.values())
            ready = {key: stored[name].to(self.device, self.dtype) for key, name in names.items()}
            enorm, hnorm = (self._norm(ready[key]) for key in ("enorm", "hnorm"))
            self._joint = enorm, hnorm, ready["eh_proj"]
        return self._joint

    def _norm(self, weight: Tensor) -> nn.Module:
        """The family's own norm with another weight."""
        made = copy.deepcopy(self.stock.decoder.norm)
        made.weight = nn.Parameter(weight, requires_grad=False)
        return made


@dataclass(frozen=True, kw_only=True)
class TrunkStates:
    """What a model came to on some batches.

    Attributes:
        hidden: behind the final norm, [B, N, D] per batch.
        top: the most likely next token at every position, [B, N] int64 per batch, on the CPU.
    """

    hidden: Activations
    top: list[Tensor]


class TrunkStream:
    """All batches on their way through a model whose layers are handed over one by one."""

    def __init__(self, model: StreamedModel, batches: Sequence[TokenBatch], plan: MemoryPlan) -> None:
        self._model, self._batches = model, [model.on_device(batch) for batch in batches]
        self._hidden = model.activations(self._batches, plan)
        model.embed(self._batches, self._hidden)

    def through(self, layer: LoadedLayer) -> None:
        """Run the next layer."""
        for number, batch in enumerate(self._batches):
            self._hidden[number] = self._model.run_layer(layer, batch, self._hidden[number])

    def finish(self) -> TrunkStates:
        """What is behind the last layer."""
        top, model = [], self._model
        for number, batch in enumerate(self._batches):
            behind = self._hidden[number].to(model.device)
            top.append(model.skeleton.logits(batch, behind).argmax(-1).cpu())
            self._hidden[number] = model.stock.decoder.norm(behind)
        return TrunkStates(hidden=self._hidden, top=top)


def run_trunk(model: StreamedModel, batches: Sequence[TokenBatch], plan: MemoryPlan) -> TrunkStates:
    """One pass of all batches through a model."""
    stream = TrunkStream(model, batches, plan)
    with announced(model, "running the trunk") as progress:
        for layer in model.layers(prefetch=plan.prefetch):
            progress.layer(layer.index)
            stream.through(layer)
    return stream.finish()


def run_module(
    model: MtpModel, tensors: Mapping[str, Tensor], batches: Sequence[TokenBatch], plan: MemoryPlan
) -> TrunkStates:
    """One pass through a module whose layer has the given fused tensors; `top` are its drafts."""
    stream = TrunkStream(model, batches, plan)
    with model.filled(0, tensors) as layer:
        stream.through(layer)
    return stream.finish()


def shifted(data: TokenData) -> TokenData:
    """The same sequences without their first tokens."""
    return replace(data, batches=tuple(_shifted(batch) for batch in data.batches))


def _shifted(batch: TokenBatch) -> TokenBatch:
    mask = batch.attention_mask
    return TokenBatch(
        input_ids=batch.input_ids[:, 1:].contiguous(),
        attention_mask=None if mask is None else mask[:, 1:].contiguous(),
        task=batch.task,
    )
