"""Load a written checkpoint with `from_pretrained` and compare every dequantized tensor with what moetools reads."""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from moetools.errors import VerificationError
from moetools.formats.reader import open_model
from moetools.forward.memory import default_budget, module_bytes
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.verification import HINT
from moetools.sizes import format_bytes

_COPIES = 3


def verify_in_transformers(path: Path, forward: ForwardOptions) -> str | None:
    """Compare all tensors of a packed checkpoint, bit for bit, as stock transformers dequantizes them.

    Returns:
        None, or why it was not done: the model does not fit the memory budget whole.

    Raises:
        VerificationError: naming the first tensor that stock transformers has otherwise, or its error.
    """
    cpu = torch.device("cpu")
    model = StreamedModel(open_model(path), forward)
    needed = _COPIES * module_bytes(model.stock.model, torch.bfloat16)
    budget = forward.budget_bytes or default_budget(cpu)
    if needed > budget:
        return f"not loaded whole in transformers, which takes {format_bytes(needed)} of memory"
    try:
        found = _stock_tensors(path, trust_remote_code=forward.trust_remote_code)
    except Exception as error:
        raise VerificationError(f"stock transformers does not load it: {error}", hint=HINT) from error
    for name, tensor in _tensors(model):
        stock = found.get(name)
        if stock is None or stock.shape != tensor.shape or not torch.equal(stock.to(tensor), tensor):
            raise VerificationError(f"stock transformers loads '{name}' otherwise", hint=HINT)
    return None


def _stock_tensors(path: Path, *, trust_remote_code: bool) -> dict[str, Tensor]:
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", local_files_only=True, trust_remote_code=trust_remote_code
            )
            # compressed-tensors unpacks linear layers when they are first used.
            with torch.no_grad():
                loaded(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
    return loaded.state_dict()


def _tensors(model: StreamedModel) -> Any:
    """Every tensor of the model as moetools reads it, by its name in the model."""
    stock = model.stock
    stock.load_rest()
    inside = f"{stock.decoder_path}.layers.".lstrip(".")
    disk = model.checkpoint.read(stock.names[None])
    for name in stock.model.state_dict():
        if not name.startswith(inside) and name in disk:
            yield name, disk[name]
    for layer in model.layers(keep_native=True, fill=False):
        assert layer.native is not None
        for name, tensor in layer.native.items():
            yield f"{inside}{layer.index}.{name}", tensor
