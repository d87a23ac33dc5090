"""Load a written checkpoint with `from_pretrained` in a process without moetools; compare it with what was meant."""

import atexit
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetools.architectures.attention import attention_option
from moetools.architectures.building import stock_class
from moetools.checkpoint.tensor_file import open_tensor_file
from moetools.errors import VerificationError
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.forward.memory import default_budget, module_bytes
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.verification import HINT, Intended, digest
from moetools.sizes import format_bytes

_SCRIPT = Path(__file__).with_name("_stock_process.py")
_COPIES = 3
_TOLERANCE = 1e-3


class StockProcess:
    """A process that has imported transformers and never imports moetools; it ends with this one."""

    _shared: "StockProcess | None" = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        # -P: the folder of the script must not be searched for modules.
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.stop)

    @classmethod
    def started(cls) -> "StockProcess":
        """The one of this process; starting it early lets it import while something else is computed."""
        with cls._lock:
            if cls._shared is None or cls._shared._child.poll() is not None:
                cls._shared = cls()
            return cls._shared

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a request; None if the process died over it."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            return None
        return json.loads(line) if line else None

    def stop(self) -> None:
        """End it."""
        self._child.kill()
        self._child.wait()


def verify_in_transformers(path: Path, forward: ForwardOptions, intended: Intended) -> str | None:
    """Compare all tensors, bit for bit, as stock transformers has them, and the probe's logits.

    Logits are compared where both ends compute alike: float32 on a CPU, and weights that are not packed.

    Returns:
        None, or why it was not done: the model does not fit in memory whole.

    Raises:
        VerificationError: naming the first tensor that stock transformers has otherwise, or its error.
    """
    model = StreamedModel(open_model(path), forward)
    packed = isinstance(model.checkpoint, PackedCheckpoint)
    same = not packed and model.dtype == torch.float32 and model.device.type == "cpu"
    needed = _COPIES * module_bytes(model.stock.model, torch.float32 if same else torch.bfloat16)
    if needed > default_budget(torch.device("cpu")):
        return f"not loaded whole in transformers, which takes {format_bytes(needed)} of memory"
    meant = {name: (str(tensor.dtype).removeprefix("torch."), digest(tensor)) for name, tensor in _tensors(model)}
    batch = intended.batch
    with tempfile.TemporaryDirectory(prefix="moetools-") as folder:
        file = Path(folder) / "logits.safetensors"
        request = {
            "path": str(path),
            "class": stock_class(model.stock.model.config).__name__,
            "dtype": "float32" if same else "auto",
            "threads": torch.get_num_threads(),
            "trust_remote_code": forward.trust_remote_code,
            "attention": attention_option(path, forward.trust_remote_code),
            "ids": batch.input_ids.tolist(),
            "mask": None if batch.attention_mask is None else batch.attention_mask.long().tolist(),
            "logits": str(file),
            "dtypes": {name: dtype for name, (dtype, _) in meant.items()},
        }
        answer = StockProcess.started().ask(request)
        if answer is None:
            return "not checked in stock transformers: the process that loaded it was ended from outside"
        if "error" in answer:
            raise VerificationError(f"stock transformers does not load it: {answer['error']}", hint=HINT)
        logits = open_tensor_file(file).read()["logits"]
    for name, (_, wanted) in meant.items():
        if answer["digests"].get(name) != wanted:
            raise VerificationError(f"stock transformers loads '{name}' otherwise", hint=HINT)
    if same:
        _compare_logits(logits, intended)
    return None


def _compare_logits(logits: Tensor, intended: Intended) -> None:
    mask = intended.batch.attention_mask
    real = slice(None) if mask is None else mask
    worst = (logits[real] - intended.logits[real]).abs().max().item()
    if worst > _TOLERANCE * intended.logits[real].abs().max().item():
        raise VerificationError(f"stock transformers gives logits that differ by up to {worst:.3g}", hint=HINT)


def _tensors(model: StreamedModel) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model as moetools reads it, by its name in the model."""
    stock = model.stock
    stock.load_rest()
    inside = f"{stock.decoder_path}.layers.".lstrip(".")
    disk = model.checkpoint.read(stock.names[None])
    for name in stock.model.state_dict():
        if not name.startswith(inside) and name in disk:
            yield name, disk[name]
    for layer in model.layers(keep_native=True, fill=False, prefetch=False):
        assert layer.native is not None
        for name, tensor in layer.native.items():
            yield f"{inside}{layer.index}.{name}", tensor
