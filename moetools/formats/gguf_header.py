"""What a GGUF file says beside its tensors: the model's structure and the tokenizer."""

import json
from collections.abc import Mapping
from typing import Any

from moetools.architectures.base import find_architecture
from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.reader import Checkpoint
from moetools.errors import CheckpointError, UnsupportedModelError
from moetools.formats.gguf_tensors import dense_lead, family_of, package

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_WORDS)  # noqa: RUF001
_SPLITS = {(_QWEN2,): "qwen2", (_LLAMA3,): "llama-bpe", (_GPT4O,): "gpt-4o", _DEEPSEEK: "deepseek-v3"}


def pre_tokenizer_of(source: Checkpoint) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    file = source.path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"GGUF: '{source.path}' holds no tokenizer.json", hint="save the tokenizer beside the model"
        )
    description = read_json_object(file)
    model, pre = description.get("model", {}), description.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UnsupportedModelError(
            "GGUF: only byte-level BPE tokenizers are written", hint="tokenizer.json says otherwise"
        )
    steps = [step for step in pre.get("pretokenizers", [pre]) if step]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "refact"
    if kinds and set(kinds[:-1]) == {"Split"} and kinds[-1] == "ByteLevel" and not steps[-1].get("use_regex", True):
        found = _SPLITS.get(tuple(step.get("pattern", {}).get("Regex") for step in steps[:-1]))
        if found is not None:
            return found
    raise UnsupportedModelError(f"GGUF: llama.cpp has no such pre-tokenizer: {json.dumps(pre)[:200]}")


def write_structure(writer: Any, source: Checkpoint) -> None:
    """Sizes, positions and routing, as the family has them in llama.cpp."""
    family = family_of(source.config)
    writer.add_name(source.path.resolve().name)
    said = {**_common(source), **_rope(source.config)}
    said |= {add: source.config[key] for key, add in family.fields.items() if source.config.get(key)}
    if family.dense_layers:
        said["add_leading_dense_block_count"] = dense_lead(source)
    for add, value in {**said, **(family.computed(source.config) if family.computed else {})}.items():
        getattr(writer, add)(package().ExpertGatingFuncType(value) if add == "add_expert_gating_func" else value)


def _common(source: Checkpoint) -> dict[str, Any]:
    config, arch = source.config, find_architecture(source.config)
    heads = config["num_attention_heads"]
    head_dim = _head_dim(config)
    return {
        "add_vocab_size": config["vocab_size"],
        "add_block_count": config["num_hidden_layers"],
        "add_context_length": config["max_position_embeddings"],
        "add_embedding_length": config["hidden_size"],
        "add_feed_forward_length": config["intermediate_size"],
        "add_head_count": heads,
        "add_head_count_kv": config.get("num_key_value_heads") or heads,
        "add_key_length": head_dim,
        "add_value_length": head_dim,
        "add_layer_norm_rms_eps": config.get("rms_norm_eps", 1e-5),
        "add_expert_count": arch.num_experts(config),
        "add_expert_used_count": arch.top_k(config),
    }


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of the rotary positions, under either spelling."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = rope_of(config)
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    said: dict[str, Any] = {
        "add_rope_freq_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "add_rope_dimension_count": config.get("rotary_dim") or int(_head_dim(config) * part),
    }
    if rope.get("rope_type", rope.get("type", "default")) != "yarn":
        return said
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    return {
        **said,
        "add_rope_scaling_type": package().RopeScalingType.YARN,
        "add_rope_scaling_factor": float(rope["factor"]),
        "add_rope_scaling_orig_ctx_len": original,
        "add_rope_scaling_yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "add_rope_scaling_yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
    }


def write_tokenizer(writer: Any, source: Checkpoint) -> None:
    """Tokens, merges and the name of the pre-tokenizer."""
    gguf = package()
    pre = pre_tokenizer_of(source)
    description = read_json_object(source.path / "tokenizer.json")
    size, model = source.config["vocab_size"], description["model"]
    tokens = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in description.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if tokens and max(tokens) >= size:
        raise CheckpointError(f"GGUF: tokenizer.json has token {max(tokens)}, the model {size} tokens")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([types.get(index, gguf.TokenType.UNUSED) for index in range(size)])
    merges = model["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for key, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        value = source.config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            add(value)
    writer.add_add_bos_token(False)
