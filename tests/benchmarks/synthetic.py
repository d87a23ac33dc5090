"""Synthetic checkpoints with layers of real shape: `python tests/benchmarks/synthetic.py SHAPE OUT --layers 2`.

Shapes: qwen3-30b-a3b, mixtral-8x7b, deepseek-v3 (MLA, 256 experts in groups, a shared expert, sigmoid router with
correction bias), gpt-oss-20b (fused experts with biases). Any number of layers, one file a layer, bfloat16. Weights are
no noise: experts of one cluster share most of their neurons, and what sets an expert apart has low rank, so that
merging, pruning and quantizing find something; some experts have a larger router bias direction, so that the load is
skewed. OUT/calibration.safetensors and OUT/test.safetensors hold token ids of two tasks with different vocabularies.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK, CLUSTERS = 32, 4
OWN, SHARED_PART = 0.6, 0.8
"""Sizes of what an expert has of its own (in low rank and as noise) and of what its cluster shares."""
SKEW = 0.5
"""Standard deviation of the experts' mean router logits, in units of their spread over tokens."""
SEQ_LEN = 512

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936, "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu",
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu", "sliding_window": None,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 0, "moe_layer_freq": 1,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "hidden_act": "silu", "num_nextn_predict_layers": 0,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 2880,
        "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "sliding_window": 128,
        "max_position_embeddings": 131072, "rope_theta": 150000.0, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "hidden_act": "silu", "swiglu_limit": 7.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Maker:
    """Makes the tensors of one checkpoint.

    Attributes:
        config: config.json; sizes that differ from the real ones may be put into it.
    """

    config: Mapping[str, Any]
    generator: torch.Generator

    def matrix(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Independent normal entries, scaled so that a unit input gives a unit output."""
        made = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=torch.bfloat16)
        return made.mul_(scale / math.sqrt(shape[-1]))

    def experts(self, count: int, rows: int, columns: int) -> Iterator[Tensor]:
        """[rows, columns] of every expert: its cluster's part, one of low rank of its own, and noise."""
        shared = [self.matrix(rows, columns, scale=SHARED_PART) for _ in range(min(CLUSTERS, count))]
        for expert in range(count):
            rank = min(RANK, rows, columns)
            low = self.matrix(rows, rank) @ self.matrix(rank, columns) * math.sqrt(columns / rank / 2)
            own = low.mul_(OWN).add_(self.matrix(rows, columns, scale=OWN / math.sqrt(2)))
            yield own.add_(shared[expert % len(shared)])

    def router(self, count: int) -> Tensor:
        """Rows that prefer the common direction of all tokens more or less: a skewed load."""
        hidden = self.config["hidden_size"]
        common = torch.ones(hidden, device=self.generator.device, dtype=torch.bfloat16) / math.sqrt(hidden)
        skew = torch.randn(count, 1, generator=self.generator, device=self.generator.device, dtype=torch.bfloat16)
        return self.matrix(count, hidden, scale=1.5) + SKEW * skew * common / math.sqrt(hidden) * 8

    def norm(self, size: int | None = None) -> Tensor:
        size = self.config["hidden_size"] if size is None else size
        return torch.ones(size, device=self.generator.device, dtype=torch.bfloat16)

    def rest(self) -> dict[str, Tensor]:
        """Embeddings, the last norm and the head; tokens share a direction."""
        vocabulary, hidden = self.config["vocab_size"], self.config["hidden_size"]
        return {
            "model.embed_tokens.weight": self.matrix(vocabulary, hidden, scale=math.sqrt(hidden)).add_(0.3),
            "model.norm.weight": self.norm(),
            "lm_head.weight": self.matrix(vocabulary, hidden, scale=2.0),
        }

    def layer(self, index: int) -> dict[str, Tensor]:
        """Everything of one decoder layer, by its public names."""
        attention = _MLA if self.config.get("kv_lora_rank") else _ATTENTION
        made = {**attention(self), **_EXPERTS[self.config["model_type"]](self)}
        made |= {"input_layernorm.weight": self.norm(), "post_attention_layernorm.weight": self.norm()}
        return {f"model.layers.{index}.{name}": tensor for name, tensor in made.items()}


def _attention(make: Maker) -> dict[str, Tensor]:
    config = make.config
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim", hidden // heads)
    query, key = heads * size, config["num_key_value_heads"] * size
    shapes = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, query)}
    made = {f"self_attn.{name}.weight": make.matrix(*shape) for name, shape in shapes.items()}
    if config["model_type"] == "qwen3_moe":
        made |= {f"self_attn.{name}.weight": make.norm(size) for name in ("q_norm", "k_norm")}
    if config["model_type"] == "gpt_oss":
        made |= {f"self_attn.{name}.bias": 0.1 * make.matrix(shape[0]) for name, shape in shapes.items()}
        made["self_attn.sinks"] = make.matrix(heads)
    return made


def _mla(make: Maker) -> dict[str, Tensor]:
    config, hidden = make.config, make.config["hidden_size"]
    heads, low, key = config["num_attention_heads"], config["q_lora_rank"], config["kv_lora_rank"]
    rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    shapes = {
        "q_a_proj": (low, hidden),
        "q_b_proj": (heads * (nope + rope), low),
        "kv_a_proj_with_mqa": (key + rope, hidden),
        "kv_b_proj": (heads * (nope + value), key),
        "o_proj": (hidden, heads * value),
    }
    made = {f"self_attn.{name}.weight": make.matrix(*shape) for name, shape in shapes.items()}
    norms = {"q_a_layernorm": low, "kv_a_layernorm": key}
    return made | {f"self_attn.{name}.weight": make.norm(size) for name, size in norms.items()}


def _numbered(make: Maker, count: int, width: int, prefix: str, names: tuple[str, str, str]) -> dict[str, Tensor]:
    hidden, made = make.config["hidden_size"], {}
    for name, rows, columns in zip(names, (width, width, hidden), (hidden, hidden, width), strict=True):
        for expert, weight in enumerate(make.experts(count, rows, columns)):
            made[f"{prefix}.experts.{expert}.{name}.weight"] = weight
    return made


def _qwen3_moe(make: Maker) -> dict[str, Tensor]:
    count, width = make.config["num_experts"], make.config["moe_intermediate_size"]
    made = _numbered(make, count, width, "mlp", ("gate_proj", "up_proj", "down_proj"))
    return made | {"mlp.gate.weight": make.router(count)}


def _mixtral(make: Maker) -> dict[str, Tensor]:
    count, width = make.config["num_local_experts"], make.config["intermediate_size"]
    made = _numbered(make, count, width, "block_sparse_moe", ("w1", "w3", "w2"))
    return made | {"block_sparse_moe.gate.weight": make.router(count)}


def _deepseek_v3(make: Maker) -> dict[str, Tensor]:
    config, hidden = make.config, make.config["hidden_size"]
    count, width = config["n_routed_experts"], config["moe_intermediate_size"]
    made = _numbered(make, count, width, "mlp", ("gate_proj", "up_proj", "down_proj"))
    shared = width * config["n_shared_experts"]
    shapes = {"gate_proj": (shared, hidden), "up_proj": (shared, hidden), "down_proj": (hidden, shared)}
    made |= {f"mlp.shared_experts.{name}.weight": make.matrix(*shape) for name, shape in shapes.items()}
    bias = 0.05 * torch.randn(count, generator=make.generator, device=make.generator.device)
    return made | {"mlp.gate.weight": make.router(count), "mlp.gate.e_score_correction_bias": bias}


def _gpt_oss(make: Maker) -> dict[str, Tensor]:
    config, hidden = make.config, make.config["hidden_size"]
    count, width = config["num_local_experts"], config["intermediate_size"]
    return {
        "mlp.router.weight": make.router(count),
        "mlp.router.bias": 0.1 * make.matrix(count),
        # Stored transposed: [experts, inputs, outputs].
        "mlp.experts.gate_up_proj": torch.stack([w.T for w in make.experts(count, 2 * width, hidden)]),
        "mlp.experts.gate_up_proj_bias": 0.1 * make.matrix(count, 2 * width),
        "mlp.experts.down_proj": torch.stack([w.T for w in make.experts(count, hidden, width)]),
        "mlp.experts.down_proj_bias": 0.1 * make.matrix(count, hidden),
    }


_ATTENTION, _MLA = _attention, _mla
_EXPERTS: dict[str, Callable[[Maker], dict[str, Tensor]]] = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}


def write_synthetic(
    shape: str, out: Path, *, layers: int, device: str = "cpu", seed: int = 0, sizes: Mapping[str, Any] | None = None
) -> Path:
    """Write the checkpoint; `sizes` replaces entries of config.json. Returns `out`."""
    config = {**SHAPES[shape], "num_hidden_layers": layers, "dtype": "bfloat16", **(sizes or {})}
    if shape == "gpt-oss-20b":
        config["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2) + ["full_attention"] * (
            layers % 2
        )
    make = Maker(config, torch.Generator(device=device).manual_seed(seed))
    out.mkdir(parents=True)
    weight_map, total = {}, 0
    for index in (None, *range(layers)):
        tensors = make.rest() if index is None else make.layer(index)
        file = f"model-{0 if index is None else index + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, out / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index_json))
    (out / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(out, config["vocab_size"])
    return out


def write_tokenizer(out: Path, vocabulary: int) -> None:
    """A byte-level tokenizer: ids 0 to 255 are bytes, 256 ends a text; the others of the vocabulary are never made."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate([*alphabet, "<|end|>"])}
    assert len(tokens) <= vocabulary
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(out / "tokenizer.json"))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    (out / "tokenizer_config.json").write_text(json.dumps(stated))


def write_tokens(out: Path, vocabulary: int, tokens: int, *, name: str, seed: int) -> list[Path]:
    """Ids of two tasks, half of `tokens` each: two parts of the vocabulary, frequent ids as common as in Zipf's law."""
    generator, files = torch.Generator().manual_seed(seed), []
    length = min(SEQ_LEN, tokens // 4)
    for task in range(2):
        known = torch.arange(task, vocabulary, 2)
        weights = 1 / torch.arange(1, len(known) + 1).double()
        rows = max(1, tokens // 2 // length)
        ids = known[torch.multinomial(weights, rows * length, replacement=True, generator=generator)].view(rows, length)
        files.append(out / f"{name}-{task}.safetensors")
        save_file({"input_ids": ids}, files[-1])
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    start = time.perf_counter()
    write_synthetic(chosen.shape, chosen.out, layers=chosen.layers, device=chosen.device, seed=chosen.seed)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in chosen.out.iterdir())
    for seed, name in enumerate(("calibration", "test")):
        write_tokens(chosen.out, SHAPES[chosen.shape]["vocab_size"], chosen.tokens, name=name, seed=seed)
    print(f"{chosen.out}: {chosen.layers} layers, {size / 1e9:.2f} GB in {seconds:.1f} s")


if __name__ == "__main__":
    main()
