"""Teacher and student as whole stock models in memory: loading, and their heads apart from their bodies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from moetools.architectures.attention import attention_option
from moetools.architectures.building import stock_class
from moetools.errors import CheckpointError, UnsupportedModelError, UserError
from moetools.forward.conversion import no_progress_bars
from moetools.forward.experts import use_experts
from moetools.forward.streaming import StreamedModel
from moetools.training.loss import Head

_HEAD_TOLERANCE = 1e-3


def load_whole(
    path: Path, *, dtype: torch.dtype, device: torch.device, trainable: bool, trust_remote_code: bool = False
) -> Any:
    """The stock causal language model in `path`.

    Args:
        trainable: all its parameters require a gradient; otherwise none does.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        CheckpointError: tensors are missing or unknown.
    """
    with no_progress_bars():
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        model, info = stock_class(config).from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **attention_option(path, trust_remote_code),
        )
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise CheckpointError(f"{path}: transformers reports {problem}: {sorted(map(str, info[problem]))[:3]}")
    if hasattr(model.config.get_text_config(), "num_experts_per_tok"):
        use_experts(model)
    return model.to(device).eval().requires_grad_(trainable)


def load_dequantized(streamed: StreamedModel) -> Any:
    """The stock causal language model with the weights that a packed checkpoint stands for.

    Args:
        streamed: the checkpoint, in the dtype wanted; afterwards it is the model.
    """
    stock = streamed.stock
    stock.load_rest()
    for index in range(stock.num_layers):
        stock.fill_layer(index, stock.read_layer(index))
    return stock.model.eval()


def head_of(model: Any) -> Head:
    """The output projection, with the family's logit scaling."""
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)
    return Head(weight_VD=output.weight, bias_V=output.bias, scale=1.0 if scaling is None else 1.0 / float(scaling))


def run_body(model: Any, ids_BN: Tensor, mask_BN: Tensor | None, *, layers: bool = False) -> tuple[Tensor, Any]:
    """Hidden states [B, N, D] behind the final norm, and those of every layer if asked for."""
    mask = None if mask_BN is None else mask_BN.long()
    output = model.base_model(
        input_ids=ids_BN, attention_mask=mask, use_cache=False, output_hidden_states=layers or None
    )
    return output.last_hidden_state, output.hidden_states if layers else None


def check_head(model: Any, path: Path) -> None:
    """The model's own logits are what `head_of` and `run_body` give, on a short sequence.

    Raises:
        UnsupportedModelError: the family does something else to its logits.
    """
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        meant = model(input_ids=ids, use_cache=False).logits.float()
        found = head_of(model).logits(run_body(model, ids, None)[0]).float()
    if (found - meant).abs().max() > _HEAD_TOLERANCE * meant.abs().max().clamp_min(1.0):
        raise UnsupportedModelError(f"{path}: this family changes its logits in a way distillation does not know")


def common_vocabulary(teacher: int, student: int, tokens: int) -> int:
    """Rows of both heads that stand for tokens of the tokenizer; what follows is padding.

    Args:
        tokens: one more than the tokenizer's largest id.

    Raises:
        UserError: a model does not predict all tokens of the tokenizer.
    """
    least = min(teacher, student)
    if least < tokens:
        raise UserError(
            f"the tokenizer has ids up to {tokens - 1}; the teacher predicts {teacher} tokens, the student {student}",
            hint="teacher and student must predict the tokens of one tokenizer",
        )
    return least
