"""Tiny random checkpoints with a multi-token-prediction layer under its public names."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from families import FAMILIES, make_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

LAYERS = 3
QWEN3_NEXT = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "intermediate_size": 48,
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MTP_FAMILIES = ("deepseek_v3", "glm4_moe", "qwen3_next")
BEHIND = {"enorm": "enorm", "hnorm": "hnorm", "fc": "eh_proj", "norm": "shared_head.norm"}
BESIDE = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "fc": "fc", "norm": "norm"}


def make_mtp(family: str, path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A model of 3 layers and one MTP layer: the fourth layer of a model of four, and what joins it to the others."""
    with patch.dict(FAMILIES, {"qwen3_next": QWEN3_NEXT}):
        make_tiny(family, path, seed=seed, dtype=dtype, num_hidden_layers=LAYERS + 1)
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    config["num_hidden_layers"] = LAYERS
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:LAYERS]
    beside = family == "qwen3_next"
    if not beside:
        config["num_nextn_predict_layers"] = 1
    last, inside = f"model.layers.{LAYERS}.", "mtp.layers.0." if beside else f"model.layers.{LAYERS}."
    tensors = {name.replace(last, inside): tensor for name, tensor in tensors.items()}
    width, generator = config["hidden_size"], torch.Generator().manual_seed(seed + 1)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    made = {
        "enorm": drawn(width) + 1,
        "hnorm": drawn(width) + 1,
        "fc": drawn(width, 2 * width),
        "norm": drawn(width) + 1,
    }
    names = BESIDE if beside else BEHIND
    tensors |= {f"{'mtp.' if beside else inside}{names[key]}.weight": tensor for key, tensor in made.items()}
    if not beside:
        tensors[f"{inside}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{inside}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def stock_drafts(path: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, N - 1, V] of transformers' own MTP model, and its trunk's [B, N, V]."""
    main: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    # The released models' own numbers are written in the classes.
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS}\."]
    mtp: Any = MtpModel.from_pretrained(main).eval()
    with torch.no_grad():
        hidden = main.model(input_ids=ids, use_cache=False).last_hidden_state
        positions = torch.arange(1, ids.shape[1])[None]
        behind = mtp.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[:, 1:])
        return mtp.shared_head(behind), main.lm_head(hidden)


def mtp_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Those of a checkpoint's MTP layer."""
    return {
        name: tensor
        for name, tensor in load_file(path / "model.safetensors").items()
        if name.startswith(("mtp.", f"model.layers.{LAYERS}."))
    }
