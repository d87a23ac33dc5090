"""What the tensors of a Mixture-of-Experts checkpoint mean: the description of a family."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from moetools.architectures.config_check import check_config, check_routing
from moetools.architectures.dense import DenseFamily
from moetools.architectures.gguf_family import GgufFamily
from moetools.architectures.mlx_family import MlxFamily
from moetools.architectures.nested import text_part, with_text_part
from moetools.errors import UnsupportedModelError, UserError
from moetools.plugins import load_plugin, plugin_names

Scoring = Literal["softmax", "sigmoid", "topk_softmax", "sparsemixer", "sqrtsoftplus", "other"]
GENERIC_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
GENERIC_TOP_K_KEYS = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k")
"""For families that only a checkpoint's own code can build."""
PREDICTION_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")
"""Config keys that count layers for multi-token prediction."""
_OWN_LAYER = r"(?:model\.|language_model\.)*layers\.(\d+)\."
_LAYER = r"(?:^|\.)(?:layers|blocks)\.(\d+)\."
Part = Literal["experts", "shared experts", "router", "attention", "dense mlp", "embedding", "norm", "other"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model family: where its router and experts are, how it scores them, and which config keys count them.

    The defaults describe the common layout (Qwen2-MoE, OLMoE, DeepSeek); a family file states only what differs. A
    family that has no file is described by what its modules do (`moetools.architectures.discovery`).

    Attributes:
        model_type: `model_type` in config.json.
        at: keys that lead to the text model's part of config.json; none where it is the whole.
        router: path inside the MoE block of the module whose `weight` has a row per expert.
        experts: path of the experts module inside the MoE block.
        router_bias: path of the router's bias inside the MoE block, if it has one.
        correction_bias: path of the score-correction bias inside the MoE block, if it has one.
        expert_scale: path of a factor of each expert's routing weights inside the MoE block, if there is one.
        scoring: how logits become routing weights.
        count_keys: config keys that hold the number of routed experts; the first is written if none is present.
        top_k_keys, width_keys: config keys of the experts per token and of one expert's width.
        fixed_top_k: experts per token of a family that has no key for them; None where there is one.
        stacks: of an encoder-decoder model, encoder first, the path of each stack's list of layers, in the model as on
            disk, and the config key that counts them. Empty for a decoder.
        group_key, topk_group_key: config keys of group-limited routing.
        min_experts_per_group: what the stock router needs to run (DeepSeek-V3 scores a group by its best two experts).
        disk_parts: patterns that tell which part of the model a tensor on disk belongs to; the first that matches wins.
        extra_tensors: pattern of checkpoint tensors that stock transformers does not load, beside those that every
            family may have (`is_extra`).
        problem: why experts and router cannot be handled, though the model can be run; None where they can.
        cannot_run: why transformers' own forward is not to be trusted; None where it is.
        dense: the dense family whose layers differ from this one's in nothing but the FFN; None where there is none.
        gguf: how llama.cpp has it; None where such files are not written.
        mlx: how mlx-lm has it; None where such folders are not written.
    """

    model_type: str
    at: tuple[str, ...] = ()
    router: str = "gate"
    experts: str = "experts"
    router_bias: str | None = None
    correction_bias: str | None = None
    expert_scale: str | None = None
    scoring: Scoring = "softmax"
    count_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)
    width_keys: tuple[str, ...] = ("moe_intermediate_size", "intermediate_size")
    fixed_top_k: int | None = None
    stacks: tuple[tuple[str, str], ...] = ()
    group_key: str = "n_group"
    topk_group_key: str = "topk_group"
    min_experts_per_group: int = 1
    disk_parts: tuple[tuple[str, Part], ...] = ()
    extra_tensors: str | None = None
    problem: str | None = None
    cannot_run: str | None = None
    dense: DenseFamily | None = None
    gguf: GgufFamily | None = None
    mlx: MlxFamily | None = None

    COMMON_PARTS: ClassVar[tuple[tuple[str, Part], ...]] = (
        (r"shared_?experts?|shared_mlp", "shared experts"),
        (r"\.experts\.|\.moe\.(gate_up|down)", "experts"),
        (r"\.(mlp|block_sparse_moe|feed_forward|moe)\.(gate|router|e_score_correction_bias|moe_statics)\b", "router"),
        (r"norm", "norm"),
        (r"attn|attention", "attention"),
        (r"embed_tokens|lm_head|wte|word_embeddings", "embedding"),
        (r"mlp|feed_forward|ffn", "dense mlp"),
    )

    def check_known(self) -> None:
        """Refuse to touch experts and router where it is not known how.

        Raises:
            UnsupportedModelError: saying what was found instead.
        """
        self.check_runs()
        self.check_decodes()
        if self.problem is not None:
            raise UnsupportedModelError(
                f"model_type '{self.model_type}' has no description, and none could be discovered: {self.problem}",
                hint="such a model can be evaluated; docs/families.md lists those that can be changed",
            )

    def check_runs(self) -> None:
        """Refuse to run a model that transformers itself does not run as it was trained.

        Raises:
            UnsupportedModelError: with what is wrong.
        """
        if self.cannot_run is not None:
            raise UnsupportedModelError(
                f"model_type '{self.model_type}' can only be inspected: {self.cannot_run}",
                hint="docs/families.md lists the families that can be run",
            )

    def check_decodes(self) -> None:
        """Refuse an encoder-decoder model where only decoders are handled.

        Raises:
            UnsupportedModelError: with what can be done.
        """
        if self.stacks:
            raise UnsupportedModelError(
                f"model_type '{self.model_type}' is an encoder-decoder model, which can only be inspected and "
                "evaluated",
                hint="the other verbs take decoders; docs/families.md lists those",
            )

    def text(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The text model's part of config.json."""
        return text_part(config, self.at)

    def num_experts(self, config: Mapping[str, Any]) -> int | None:
        """Routed experts of a layer, from config.json; None where no key is present or every layer is dense."""
        if self.dense is not None and self.dense.is_all_dense(config):
            return None
        return first_present(self.text(config), self.count_keys)

    def top_k(self, config: Mapping[str, Any]) -> int | None:
        """Experts per token, from config.json; None where no key is present."""
        found = first_present(self.text(config), self.top_k_keys)
        return self.fixed_top_k if found is None else found

    def num_layers(self, config: Mapping[str, Any]) -> int | None:
        """Layers of all stacks together, from config.json; None where it does not say."""
        text = self.text(config)
        counts = [text.get(key) for _, key in self.stacks] or [text.get("num_hidden_layers")]
        return None if None in counts else sum(count for count in counts if count is not None)

    def layer_of(self, name: str, config: Mapping[str, Any]) -> int | None:
        """Index of the layer that a tensor on disk belongs to; a stack's layers follow those of the stacks before."""
        before = 0
        stacks = [(rf"^{re.escape(path)}\.(\d+)\.", key) for path, key in self.stacks]
        for pattern, key in stacks or [(_LAYER, "num_hidden_layers")]:
            if found := re.search(pattern, name):
                return before + int(found[1])
            before += self.text(config).get(key) or 0
        return None

    def num_groups(self, config: Mapping[str, Any]) -> int:
        """Router groups; 1 where routing is not group-limited."""
        config = self.text(config)
        if config.get("topk_method") == "greedy":
            return 1
        return config.get(self.group_key) or 1

    def is_extra(self, name: str, config: Mapping[str, Any]) -> bool:
        """Whether stock transformers ignores this tensor: multi-token prediction layers, stored rotary tables.

        Such tensors are carried over untouched.
        """
        config = self.text(config)
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= config.get("num_hidden_layers", int(layer[1]) + 1):
            return True
        return bool(
            re.search(r"rotary_emb\.inv_freq$", name) or (self.extra_tensors and re.search(self.extra_tensors, name))
        )

    def predicts_more(self, name: str, config: Mapping[str, Any]) -> bool:
        """Whether a tensor on disk is one of a layer for multi-token prediction, which stands behind the decoder's own.

        DeepSeek-V3 and GLM-4.5 number it as the next layer, others (Qwen3-Next, ERNIE-4.5) name it `mtp`.
        """
        layer, count = re.match(_OWN_LAYER, name), self.text(config).get("num_hidden_layers")
        return bool(re.search(r"(^|\.)mtp", name) or (layer and count is not None and int(layer[1]) >= count))

    def without_prediction(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of a model that has no layers for multi-token prediction any more."""
        text = self.text(config)
        return with_text_part(config, self.at, {**text, **{key: 0 for key in PREDICTION_KEYS if text.get(key)}})

    def part_of(self, name: str) -> Part:
        """The part of the model that a tensor on disk belongs to."""
        for pattern, part in (*self.disk_parts, *self.COMMON_PARTS):
            if re.search(pattern, name):
                return part
        return "other"

    def check_expert_count(self, config: Mapping[str, Any], target: int, *, option: str = "`keep`") -> None:
        """Refuse a number of experts that the family's router cannot serve.

        One expert is always asked for on purpose (dense by aggregation) and lowers top-k to 1; any other target must be
        at least top-k. Group-limited routers need equal groups that still hold top-k experts.

        Raises:
            UserError: naming the target, the bound it breaks and the nearest legal value.
        """
        count = self.num_experts(config)
        top_k = self.top_k(config) or 1
        legal = self.legal_counts(config)
        shown = f"{legal[0]} to {legal[-1]}" if legal.step == 1 else ", ".join(map(str, legal))
        hint = f"legal targets: {shown}" + ("" if self.min_experts_per_group > 1 else "; or merge to 1 (dense)")
        if target < 1 or (count is not None and target > count):
            raise UserError(f"{option} {target} is not between 1 and the model's {count} experts", hint=hint)
        if target == 1 and self.min_experts_per_group > 1:
            message = f"{option} 1: {self.model_type} routers need at least {self.min_experts_per_group} experts"
            raise UserError(message, hint=hint)
        if 1 < target < top_k:
            raise UserError(f"{option} {target} is below top-k: every token uses {top_k} experts", hint=hint)
        if target > 1 and target not in (legal if count is not None else range(legal.start, target + 1, legal.step)):
            raise UserError(
                f"{option} {target} breaks the router's {legal.step} groups: every group keeps the same number of "
                f"experts, at least {legal.start // legal.step}",
                hint=hint,
            )

    def legal_counts(self, config: Mapping[str, Any]) -> range:
        """Every number of experts that the family's router can serve as it is, up to those that there are."""
        top_k, groups = self.top_k(config) or 1, self.num_groups(config)
        chosen = self.text(config).get(self.topk_group_key) or groups if groups > 1 else 1
        least = max(-(-top_k // chosen), self.min_experts_per_group) * groups
        return range(least, (self.num_experts(config) or least) + 1, groups)

    def with_expert_count(self, config: Mapping[str, Any], target: int) -> dict[str, Any]:
        """config.json for the new number of experts: the input's own, with only the keys changed that must change."""
        return with_text_part(config, self.at, self._with_count(self.text(config), target))

    def with_text(self, config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with some keys of the text model's part changed."""
        return with_text_part(config, self.at, {**self.text(config), **changes})

    def _with_count(self, config: Mapping[str, Any], target: int) -> dict[str, Any]:
        changed = dict(config)
        present = [key for key in self.count_keys if key in config]
        changed.update({key: _all(config.get(key), target) for key in present or self.count_keys[:1]})
        if target == 1:
            present = [key for key in self.top_k_keys if key in config]
            changed.update({key: _all(config.get(key), 1) for key in present or self.top_k_keys[:1]})
            changed.update({key: 1 for key in (self.group_key, self.topk_group_key) if config.get(key)})
        return changed


def _all(old: Any, value: int) -> Any:
    """`value`, for every layer where the old one was a list by layer."""
    return [value] * len(old) if isinstance(old, list) else value


def first_present(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    """Value of the first key that config.json has and that is not null; the largest of a list by layer."""
    found: Any = next((config[key] for key in keys if config.get(key) is not None), None)
    return max(found) if isinstance(found, list) and found else found


def find_architecture(config: Mapping[str, Any], *, dense: bool = False) -> Architecture:
    """The description of the family named by `model_type`: its own file, or what is discovered where it has none.

    Args:
        dense: accept a model without experts as well.

    Raises:
        CheckpointError: a value of config.json that cannot be (`check_config`).
        UnsupportedModelError: config.json has no model_type, or no key that counts experts.
    """
    check_config(config)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedModelError("config.json has no model_type", hint="is this a Hugging Face model folder?")
    families = "moetools.architectures.families"
    if model_type.replace("_", "-") in plugin_names(families):
        arch = load_plugin(families, model_type, kind="model family").ARCHITECTURE
    else:
        arch = (_discovered(config) if _speaks_of_experts(config) else None) or Architecture(model_type=model_type)
        arch = replace(arch, **engines_of(model_type))
    check_routing(config, arch)
    if dense:
        return arch
    arch.check_known()
    if not arch.num_experts(config):
        raise UnsupportedModelError(
            f"model_type '{model_type}' is not a Mixture-of-Experts model: config.json counts no experts",
            hint="moetools works on MoE checkpoints (Mixtral, Qwen-MoE, OLMoE, DeepSeek, gpt-oss, ...)",
        )
    return arch


def engines_of(model_type: str) -> Mapping[str, Any]:
    """How engines have a family without a file of its own."""
    from moetools.architectures.engines import ENGINES

    return ENGINES.get(model_type, {})


def _speaks_of_experts(config: Any) -> bool:
    """Whether some key of config.json, nested or not, names a positive number of experts."""
    if not isinstance(config, Mapping):
        return False
    counted = any("expert" in str(key) and _counts(value) for key, value in config.items())
    return counted or config.get("enable_moe_block") is True or any(map(_speaks_of_experts, config.values()))


def _counts(value: Any) -> bool:
    """Whether this is a number of something, or a list of such by layer; JSON's true is an int for isinstance."""
    numbers = value if isinstance(value, list) else [value]
    return all(type(one) is int for one in numbers) and any(numbers)


def _discovered(config: Mapping[str, Any]) -> Architecture:
    """Built and tried, which takes torch and transformers; the common layout where they do not know the family."""
    from transformers import CONFIG_MAPPING

    from moetools.architectures.discovery import discover

    if config["model_type"] in CONFIG_MAPPING:
        return discover(config)
    return Architecture(model_type=config["model_type"], count_keys=GENERIC_COUNT_KEYS, top_k_keys=GENERIC_TOP_K_KEYS)
