"""Tiny checkpoints in the layouts that others publish, packed after the formulas by loops over numbers, and the dense
checkpoints that they stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Parts = dict[str, torch.Tensor]
Packer = Callable[[str, tuple[int, ...], np.random.Generator], tuple[Parts, torch.Tensor]]
"""Parts of a tensor by name on disk, and the dense tensor, from name and shape of the original: contents are random."""

GROUP = 16
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs AutoAWQ's `pack_intweight` puts into nibble 0, 1, ..."""


def words(numbers: np.ndarray) -> torch.Tensor:
    """[..., 8] numbers below 16 as int32 words, the first in the lowest bits."""
    total = sum(numbers[..., place].astype(np.uint64) << np.uint64(4 * place) for place in range(8))
    return torch.from_numpy(total.astype(np.uint32).view(np.int32).copy())


def integers(shape: tuple[int, ...], draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [I, O], zero points and half-precision scales [G, O]."""
    rows, columns = shape
    groups = (columns // GROUP, rows)
    scale = draw.uniform(0.01, 0.05, groups).astype(np.float16)
    return draw.integers(0, 16, (columns, rows)), draw.integers(0, 16, groups), scale


def dense_of(codes: np.ndarray, zero: np.ndarray, scale: np.ndarray, group: np.ndarray) -> torch.Tensor:
    """Output by output, input by input."""
    value = np.empty(codes.T.shape, dtype=np.float32)
    for row in range(value.shape[0]):
        for column in range(value.shape[1]):
            place = group[column]
            value[row, column] = np.float32(scale[place, row]) * (int(codes[column, row]) - int(zero[place, row]))
    return torch.from_numpy(value).bfloat16()


def gptq(name: str, shape: tuple[int, ...], draw: np.random.Generator, *, less: int = 1) -> tuple[Parts, torch.Tensor]:
    """With `desc_act`: inputs belong to groups in no order."""
    codes, zero, scale = integers(shape, draw)
    group = draw.permutation(np.arange(shape[1]) // GROUP)
    base = name.removesuffix(".weight")
    parts = {
        f"{base}.qweight": words(codes.reshape(-1, 8, shape[0]).transpose(0, 2, 1)),
        f"{base}.qzeros": words(((zero - less) % 16).reshape(len(zero), -1, 8)),
        f"{base}.scales": torch.from_numpy(scale),
        f"{base}.g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    return parts, dense_of(codes, zero, scale, group)


def gptq_v2(name: str, shape: tuple[int, ...], draw: np.random.Generator) -> tuple[Parts, torch.Tensor]:
    """Zero points as they are."""
    return gptq(name, shape, draw, less=0)


def awq(name: str, shape: tuple[int, ...], draw: np.random.Generator) -> tuple[Parts, torch.Tensor]:
    codes, zero, scale = integers(shape, draw)
    base = name.removesuffix(".weight")
    parts = {
        f"{base}.qweight": words(codes.reshape(shape[1], -1, 8)[..., AWQ_ORDER]),
        f"{base}.qzeros": words(zero.reshape(len(zero), -1, 8)[..., AWQ_ORDER]),
        f"{base}.scales": torch.from_numpy(scale),
    }
    return parts, dense_of(codes, zero, scale, np.arange(shape[1]) // GROUP)


def nvfp4(name: str, shape: tuple[int, ...], draw: np.random.Generator) -> tuple[Parts, torch.Tensor]:
    rows, columns = shape
    codes = draw.integers(0, 16, shape)
    scale = torch.from_numpy(draw.uniform(20, 400, (rows, columns // 16)).astype(np.float32)).to(torch.float8_e4m3fn)
    whole = torch.tensor(0.0003)
    base = name.removesuffix(".weight")
    parts = {
        name: torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)),
        f"{name}_scale": scale,
        f"{name}_scale_2": whole,
        f"{base}.input_scale": torch.tensor(0.01),
    }
    factor = (scale.float() * whole).numpy().repeat(16, axis=1)
    return parts, torch.from_numpy(E2M1[codes] * factor).bfloat16()


def fp8_tensor(name: str, shape: tuple[int, ...], draw: np.random.Generator) -> tuple[Parts, torch.Tensor]:
    """One scale for all of a matrix, and what only FP8 arithmetic and caches need."""
    codes = torch.from_numpy(draw.standard_normal(shape).astype(np.float32)).to(torch.float8_e4m3fn)
    scale, base = torch.tensor(0.07), name.removesuffix(".weight")
    parts = {name: codes, f"{name}_scale": scale, f"{base}.input_scale": torch.tensor(0.01)}
    if base.endswith("k_proj"):
        parts[f"{base}.k_scale"] = torch.tensor(0.5)
    return parts, (codes.float() * scale).bfloat16()


def deepseek_v4(name: str, shape: tuple[int, ...], draw: np.random.Generator) -> tuple[Parts, torch.Tensor]:
    """transformers' own conversion gives the dense tensor; experts are FP4, the others FP8."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, columns = shape
    if ".experts." in name:
        codes = torch.from_numpy(draw.integers(-128, 128, (rows, columns // 2)).astype(np.int8))
        blocks = (rows, columns // 32)
    else:
        codes = torch.from_numpy(draw.standard_normal(shape).astype(np.float32)).to(torch.float8_e4m3fn)
        blocks = (-(-rows // 128), -(-columns // 128))
    scale = torch.from_numpy(draw.integers(118, 126, blocks).astype(np.uint8)).view(torch.float8_e8m0fnu)
    dense = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    return {name: codes, name.replace(".weight", ".scale"): scale}, dense


def fp8(name: str, shape: tuple[int, ...], draw: np.random.Generator) -> tuple[Parts, torch.Tensor]:
    """Blocks of 128 x 128, those at the edges smaller."""
    codes = torch.from_numpy(draw.standard_normal(shape).astype(np.float32)).to(torch.float8_e4m3fn)
    blocks = tuple(-(-size // 128) for size in shape)
    scale = torch.from_numpy(draw.uniform(0.05, 0.2, blocks).astype(np.float32))
    value = codes.float().clone()
    for row in range(blocks[0]):
        for column in range(blocks[1]):
            value[128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)] *= scale[row, column]
    return {name: codes, f"{name}_scale_inv": scale}, value.bfloat16()


def mxfp4(name: str, shape: tuple[int, ...], draw: np.random.Generator) -> tuple[Parts, torch.Tensor]:
    """transformers' own conversion gives the dense tensor."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts, columns, rows = shape
    blocks = torch.from_numpy(draw.integers(0, 256, (experts, rows, columns // 32, 16)).astype(np.uint8))
    scales = torch.from_numpy(draw.integers(118, 126, (experts, rows, columns // 32)).astype(np.uint8))
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, convert_moe_packed_tensors(blocks, scales)


def publish(
    source: Path, folder: Path, packer: Packer, chosen: Callable[[str], bool], config: dict[str, Any]
) -> tuple[Path, Path]:
    """`source` with the tensors that are `chosen` packed, in `folder`/packed, and the dense one, in `folder`/plain."""
    draw = np.random.default_rng(0)
    packed, plain = shutil.copytree(source, folder / "packed"), shutil.copytree(source, folder / "plain")
    on_disk: Parts = {}
    dense: Parts = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        parts = {name: tensor}
        if chosen(name):
            parts, tensor = packer(name, tuple(tensor.shape), draw)
        on_disk |= parts
        dense[name] = tensor.contiguous()
    save_file(on_disk, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((packed / "config.json").read_text()) | {"quantization_config": config}
    (packed / "config.json").write_text(json.dumps(written))
    return packed, plain


LINEARS = ("experts.", "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "q_a_proj", "kv_a_proj")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 32}
QWEN = SIZES | {"moe_intermediate_size": 32, "head_dim": 16}
GPTQ = {"quant_method": "gptq", "desc_act": True, "bits": 4, "group_size": GROUP}
AWQ = {"quant_method": "awq", "version": "gemm", "zero_point": True, "bits": 4, "group_size": GROUP}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CASES = {
    "gptq": ("qwen3_moe", QWEN, gptq, GPTQ),
    "gptq-v2": ("mixtral", SIZES, gptq_v2, GPTQ | {"checkpoint_format": "gptq_v2"}),
    "awq": ("qwen3_moe", QWEN, awq, AWQ),
    "nvfp4": ("qwen3_moe", QWEN, nvfp4, MODELOPT),
    "modelopt-fp8": ("qwen3_moe", QWEN, fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "static-fp8": ("mixtral", SIZES, fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "deepseek-v4": ("qwen3_moe", QWEN, deepseek_v4, BLOCKS | {"scale_fmt": "ue8m0"}),
    "mxfp4": ("gpt_oss", SIZES, mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
    "fp8-deepseek": ("deepseek_v3", SIZES | {"hidden_size": 160, "moe_intermediate_size": 32}, fp8, BLOCKS),
    "fp8-qwen": ("qwen3_moe", QWEN | {"hidden_size": 160}, fp8, BLOCKS),
}


def linear(name: str) -> bool:
    return name.endswith(".weight") and any(part in name for part in LINEARS)


def fused(name: str) -> bool:
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def case(name: str, tiny: Callable[..., Path], folder: Path) -> tuple[Path, Path]:
    """The packed checkpoint and the dense one."""
    family, sizes, packer, config = CASES[name]
    return publish(tiny(family, **sizes), folder, packer, fused if family == "gpt_oss" else linear, config)
