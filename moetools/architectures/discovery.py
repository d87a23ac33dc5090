"""The description of a family that has no file, found out by building it without weights and running one router.

A model is built twice on the meta device, the second time with twice the experts and one more per token: whatever
changes belongs to the experts, and the config key that does it counts them. One MoE block with random router weights
then tells what its scores are.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from moetools.architectures.base import Architecture, Part, Scoring
from moetools.architectures.building import (
    construction,
    decoder_path,
    disk_names,
    first_line,
    from_config,
    stock_config,
    uses_experts_interface,
)
from moetools.architectures.config_check import EXPERTS_PER_LAYER
from moetools.architectures.dense import OWN_KEYS, DenseFamily
from moetools.architectures.own_dense import own_dense
from moetools.errors import UnsupportedModelError

_COUNT_NAME = re.compile(r"expert")
_NO_COUNT_NAME = re.compile(r"per_tok|shared|group|period|offset|interval|size")
_TOP_K_NAME = re.compile(r"top_?k|per_tok|moe_k$")
_NO_TOP_K_NAME = re.compile(r"group|index")
_GROUP_NAME = re.compile(r"^(moe_)?n_group$|^(n|num)_expert_groups?$")
_WIDTH_NAME = re.compile(r"intermediate|ffn|width")
_PRODUCTS = (functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
_TOKENS = 64
_SAME = 1e-4
_FOUND: dict[str, Architecture] = {}


@dataclass(frozen=True, kw_only=True)
class _Block:
    """One MoE block of a model: path of its layer in the model, paths of block and experts inside the layer."""

    layer: str
    block: str
    experts: str
    num_experts: int

    @property
    def path(self) -> str:
        return ".".join(filter(None, (self.layer, self.block)))


def discover(config: Mapping[str, Any]) -> Architecture:
    """What `config` describes, once per process.

    Its `problem` says why the experts cannot be handled: transformers cannot build the model, no layer runs its experts
    through transformers' interface, or what was found is inconsistent.
    """
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", EXPERTS_PER_LAYER)}
    key = json.dumps(plain, sort_keys=True, default=str)
    if key not in _FOUND:
        arch = Architecture(model_type=str(config.get("model_type")))
        try:
            # Whoever asks may be building a model on the meta device.
            with torch.device("cpu"):
                _FOUND[key] = _Discovery(plain).architecture()
        except _Unclear as unclear:
            _FOUND[key] = replace(unclear.arch, problem=str(unclear))
        except UnsupportedModelError as error:
            _FOUND[key] = replace(arch, problem=error.message.removeprefix(f"model_type '{arch.model_type}': "))
    return _FOUND[key]


class _Unclear(Exception):  # noqa: N818 - becomes the description's `problem`
    def __init__(self, what: str, arch: Architecture) -> None:
        super().__init__(what)
        self.arch = arch


class _Discovery:
    def __init__(self, config: dict[str, Any]) -> None:
        self._config, self._type = config, str(config.get("model_type"))
        self._arch = Architecture(model_type=self._type)
        self._parsed = stock_config(config, Path(self._type))
        self._text = self._parsed.get_text_config()
        self._at = next((name for name in self._parsed.sub_configs if getattr(self._parsed, name) is self._text), None)

    def architecture(self) -> Architecture:
        model = self._build(self._config)
        blocks = list(_blocks(model, self._type))
        if not blocks:
            family = DenseFamily(own_keys=OWN_KEYS, at=() if self._at is None else (self._at,))
            if family.is_all_dense(self._config):
                return replace(self._arch, at=family.at, dense=family)
            self._refuse("no layer runs its experts through transformers' experts interface")
        first = max(blocks, key=lambda block: len(model.get_submodule(block.path).state_dict()))
        counts = {block.num_experts for block in blocks}
        if len(counts) > 1 or len({(block.block, block.experts) for block in blocks}) > 1:
            self._refuse(
                f"MoE blocks that differ: {sorted({f'{b.path}: {b.num_experts} experts' for b in blocks})[:3]}"
            )
        base = Architecture(
            model_type=self._type,
            at=() if self._at is None else (self._at,),
            experts=first.experts,
            count_keys=self._aliases(self._key(first.num_experts, _COUNT_NAME, _NO_COUNT_NAME, "experts")),
            width_keys=self._aliases(self._width_key(model.get_submodule(f"{first.path}.{first.experts}".lstrip(".")))),
            group_key=next((key for key in self._text.to_dict() if _GROUP_NAME.search(str(key))), "n_group"),
            # With one expert no tensor's dimension tells the experts, and the result could not be described again.
            min_experts_per_group=2,
        )
        self._arch = base
        self._refuse_tables(blocks, model)
        wider = self._build(base.with_expert_count(self._config, 2 * first.num_experts))
        self._arch = self._places(base, first, model, wider)
        self._arch = self._behaviour(self._arch, first, model)
        return replace(self._parts(self._arch, first, model), dense=self._dense(model, blocks))

    def _dense(self, model: Any, blocks: Sequence[_Block]) -> DenseFamily | None:
        layers = f"{decoder_path(model, self._type)}.layers".lstrip(".")
        found = {block.layer: block.block for block in blocks}
        ffns = [found.get(f"{layers}.{index}", "mlp") for index in range(len(model.get_submodule(layers)))]
        experts = model.get_submodule(f"{blocks[0].path}.{blocks[0].experts}")
        at = () if self._at is None else (self._at,)
        return own_dense(self._config, self._text, at, self._build, model, layers, ffns, experts)

    def _build(self, config: Mapping[str, Any]) -> Any:
        parsed = stock_config(config, Path(self._type))
        with construction(Path(self._type)), torch.device("meta"):
            return from_config(parsed).eval()

    def _refuse(self, what: str) -> NoReturn:
        raise _Unclear(what, self._arch)

    def _refuse_tables(self, blocks: Sequence[_Block], model: Any) -> None:
        for block in blocks:
            for name, tensor in model.get_submodule(block.path).state_dict().items():
                if not tensor.is_floating_point() and tensor.dim():
                    self._refuse(f"'{name}' {list(tensor.shape)} holds whole numbers, which may be those of experts")

    def _key(self, value: int, names: re.Pattern[str], others: re.Pattern[str], what: str) -> str:
        """The key of the text config that has this value, or a list of it by layer."""
        found = [
            str(key)
            for key, stated in self._text.to_dict().items()
            if names.search(str(key)) and not others.search(str(key)) and _most(stated) == value
        ]
        if len(found) != 1:
            self._refuse(f"{what} are {value}, and {len(found)} config keys say so {found}")
        return found[0]

    def _aliases(self, key: str) -> tuple[str, ...]:
        """The key as this config.json spells it first, then transformers' other names for it."""
        same = [key, *(alias for alias, meant in self._text.attribute_map.items() if meant == key)]
        stated = self._config if self._at is None else self._config.get(self._at) or {}
        return tuple(sorted(dict.fromkeys(same), key=lambda name: name not in stated))

    def _width_key(self, experts: Any) -> str:
        width = experts.down_proj.shape[1 if experts.is_transposed else 2]
        found = [
            str(key)
            for key, stated in self._text.to_dict().items()
            if _WIDTH_NAME.search(str(key)) and "shared" not in str(key) and _most(stated) == width
        ]
        return next((key for key in found if re.search("moe|expert", key)), found[0] if found else "intermediate_size")

    def _places(self, arch: Architecture, first: _Block, model: Any, wider: Any) -> Architecture:
        """Which tensors of the block have an expert dimension: those that grew with the number of experts."""
        old, new = model.state_dict(), wider.state_dict()
        prefix = f"{first.path}."
        grown: dict[str, tuple[int, ...]] = {}
        for name in sorted(old.keys() | new.keys()):
            before, after = (tuple(side[name].shape) if name in side else () for side in (old, new))
            if before == after:
                continue
            if name.startswith(prefix):
                grown[name.removeprefix(prefix)] = before
            doubled = tuple(2 * size if size == first.num_experts else size for size in before)
            if sum(a != b for a, b in zip(before, after, strict=False)) != 1 or after != _one_doubled(
                before, doubled, after
            ):
                self._refuse(
                    f"'{name}' is {list(before)} for {first.num_experts} experts, {list(after)} for twice those"
                )
        others = {name: shape for name, shape in grown.items() if not name.startswith(f"{first.experts}.")}
        matrices = [name for name, shape in others.items() if len(shape) == 2 and shape[0] == first.num_experts > 1]
        if len(matrices) != 1 or not matrices[0].endswith(".weight"):
            self._refuse(f"tensors with an expert dimension outside the experts: {others}")
        router = matrices[0].removesuffix(".weight")
        vectors = [name for name in others if name != matrices[0]]
        self._vectors = [name for name in vectors if name != f"{router}.bias"]
        return replace(arch, router=router, router_bias=f"{router}.bias" if f"{router}.bias" in vectors else None)

    def _behaviour(self, arch: Architecture, first: _Block, model: Any) -> Architecture:
        """What the router's scores are, what its vectors do, and which key counts the experts per token."""
        probe = _Probe(model.get_submodule(first.path), arch, first.num_experts)
        seen = probe.run()
        key = self._key(seen.index_TK.shape[1], _TOP_K_NAME, _NO_TOP_K_NAME, "experts per token")
        arch = replace(arch, top_k_keys=self._aliases(key), scoring=_scoring(seen))
        for name in self._vectors:
            changed = probe.run(**{name: torch.linspace(-3, 3, first.num_experts)})
            moved = not torch.equal(changed.index_TK, seen.index_TK)
            kind = "correction_bias" if moved else "expert_scale"
            if not torch.allclose(changed.logits_TE, seen.logits_TE) or getattr(arch, kind) is not None:
                self._refuse(f"'{name}' is neither a bias of the choice nor a factor of the weights")
            arch = replace(arch, correction_bias=name) if moved else replace(arch, expert_scale=name)
        return arch

    def _parts(self, arch: Architecture, first: _Block, model: Any) -> Architecture:
        """Patterns for the names on disk that the common ones take for another part."""
        kinds: dict[str, Part] = {f"{arch.experts}.": "experts", f"{arch.router}.": "router"}
        vectors = {name for name in (arch.correction_bias, arch.expert_scale) if name}
        patterns: dict[str, Part] = {}
        for inside, tensor in model.get_submodule(first.path).state_dict().items():
            part: Part | None = "router" if inside in vectors else None
            part = part or next((kind for start, kind in kinds.items() if inside.startswith(start)), None)
            if part is None:
                continue
            for name in disk_names(model, f"{first.path}.{inside}", tensor):
                if arch.part_of(name) != part:
                    short = re.split(r"\blayers\.\d+\.", name)[-1]
                    patterns[re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", rf"\.{re.escape(short)}$")] = part
        return replace(arch, disk_parts=tuple(patterns.items()))


def _one_doubled(before: Sequence[int], doubled: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    """`before` with the one size doubled that differs in `after`."""
    return tuple(big if small != found else small for small, big, found in zip(before, doubled, after, strict=False))


def _most(value: Any) -> Any:
    """The largest of a list by layer, or the value itself."""
    numbers = isinstance(value, list) and value and all(type(one) is int for one in value)
    return max(value) if numbers else value


def _blocks(model: Any, model_type: str) -> Iterator[_Block]:
    owner = decoder_path(model, model_type)
    for index, layer in enumerate(model.get_submodule(owner).layers):
        for name, module in layer.named_modules():
            if uses_experts_interface(module):
                block, _, experts = name.rpartition(".")
                path = f"{owner}.layers.{index}".lstrip(".")
                yield _Block(layer=path, block=block, experts=experts, num_experts=module.num_experts)


@dataclass(frozen=True)
class _Seen:
    logits_TE: Tensor
    index_TK: Tensor
    weight_TK: Tensor


class _Probe:
    """A MoE block whose router has random weights, whose experts are not run, and whose other parts do nothing."""

    def __init__(self, block: nn.Module, arch: Architecture, count: int) -> None:
        self._block: Any = copy.deepcopy(block)
        self._arch, self._count = arch, count
        self._generator = torch.Generator().manual_seed(0)
        kept = {arch.experts, arch.router.split(".")[0]}
        for name, _ in list(self._block.named_children()):
            if name not in kept:
                setattr(self._block, name, _Same())
        experts: Any = self._block.get_submodule(arch.experts)
        self._experts: Any = experts
        for path, tensor in [*self._block.named_parameters(), *self._block.named_buffers()]:
            if not path.startswith(f"{arch.experts}."):
                _put(self._block, path, self._random(path, tensor))
        width: int = experts.down_proj.shape[2 if experts.is_transposed else 1]
        self._hidden = torch.randn(1, _TOKENS, width, generator=self._generator)

    def _random(self, path: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        if tensor.dim() >= 2 and path == f"{self._arch.router}.weight":
            return torch.randn(tensor.shape, generator=self._generator) * 2 / tensor.shape[-1] ** 0.5
        bias = path.endswith("bias") or (tensor.shape[-1:] == (self._count,) and "scale" not in path)
        return torch.zeros(tensor.shape) if bias else torch.ones(tensor.shape)

    def run(self, **vectors: Tensor) -> _Seen:
        """Logits, choice and weights for random tokens; `vectors` replace tensors of the block by their path."""
        for path, value in vectors.items():
            old = self._block.state_dict()[path]
            _put(self._block, path, value.reshape(old.shape))
        found: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.extend([*args, *kwargs.values()])
            raise _Reached

        handle = self._experts.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), _Linear(self._count) as linear:
                self._call()
        except _Reached:
            pass
        except Exception as error:  # a family's own code
            raise _Unclear(f"its MoE block does not run alone: {first_line(error)}", self._arch) from error
        finally:
            handle.remove()
        index = next((one for one in found if isinstance(one, Tensor) and not one.is_floating_point()), None)
        if index is None or not linear.seen:
            raise _Unclear("its router does not choose experts from the logits of one linear layer", self._arch)
        weight = next(one for one in found if one.is_floating_point() and one.shape == index.shape)
        return _Seen(linear.seen[0].reshape(-1, self._count).float(), index, weight.float())

    def _call(self) -> None:
        if isinstance(getattr(self._block, "self_attn", None), _Same):
            # The block is the whole layer: its router alone gives logits, weights and choice.
            routed = self._block.get_submodule(self._arch.router.split(".")[0])(self._hidden[0])
            weight, index = [one for one in routed if one.shape[-1] != self._count][:2]
            self._experts(self._hidden[0], index, weight)
        self._block(self._hidden)


class _Reached(Exception):  # noqa: N818 - not an error: the experts would run now
    pass


class _Same(nn.Module):
    def forward(self, hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden


class _Linear(TorchFunctionMode):
    """Keeps the results of linear layers with one output per expert."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and result.shape[-1] == self._count:
            self.seen.append(result)
        return result


def _scoring(seen: _Seen) -> Scoring:
    """Which function of the logits the weights are proportional to, within each token."""
    logits_TK = seen.logits_TE.gather(1, seen.index_TK)
    candidates: dict[Scoring, Tensor] = {
        "softmax": logits_TK,
        "sigmoid": functional.logsigmoid(logits_TK),
        "sqrtsoftplus": functional.softplus(logits_TK).log() / 2,
    }
    ratio_TK = seen.weight_TK.clamp_min(1e-30).log()
    for name, log_TK in candidates.items():
        difference_TK = ratio_TK - log_TK
        if seen.index_TK.shape[1] > 1 and (difference_TK - difference_TK[:, :1]).abs().max() < _SAME:
            return name
    return "other"


def _put(module: nn.Module, path: str, tensor: Tensor) -> None:
    owner, _, leaf = path.rpartition(".")
    place: Any = module.get_submodule(owner)
    if leaf in place._buffers:
        place._buffers[leaf] = tensor
    else:
        place._parameters[leaf] = nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor
