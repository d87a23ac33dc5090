"""How a model is run; imports no torch, so that the command line can show the options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetools.arguments import RUNNING, option
from moetools.errors import UserError
from moetools.sizes import parse_bytes

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ForwardOptions:
    """How a model is run; the same options on every verb."""

    device: str = option("auto", "auto (CUDA where there is one), cpu, cuda or cuda:N.", metavar="NAME", panel=RUNNING)
    dtype: str = option(
        "auto",
        f"Compute dtype: {', '.join(DTYPE_NAMES)}. auto is float32 on a CPU and bfloat16 on a GPU.",
        metavar="NAME",
        panel=RUNNING,
        choices=lambda: DTYPE_NAMES,
    )
    memory_budget: int | str | None = option(
        None,
        "Bound for weights and activations on the computing device, such as 8GiB or 500MB; four fifths of the free "
        "memory if not given.",
        metavar="SIZE",
        panel=RUNNING,
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the checkpoint.", panel=RUNNING)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NAMES:
            raise UserError(f"`dtype={self.dtype}` is not a compute dtype", hint=f"legal: {', '.join(DTYPE_NAMES)}")
        if isinstance(self.memory_budget, str):
            object.__setattr__(self, "memory_budget", parse_bytes(self.memory_budget))

    @property
    def budget_bytes(self) -> int | None:
        """The memory budget in bytes; None takes most of what is free."""
        assert not isinstance(self.memory_budget, str)
        return self.memory_budget

    def torch_device(self) -> torch.device:
        """The device asked for.

        Raises:
            UserError: there is no such device.
        """
        import torch

        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UserError(f"'{name}' is not a device", hint="auto, cpu, cuda or cuda:N") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device '{name}' asked for, but torch sees no CUDA device", hint="use `device=cpu`")
        return device

    def torch_dtype(self) -> torch.dtype:
        """The compute dtype."""
        import torch

        if self.dtype == "auto":
            return torch.bfloat16 if self.torch_device().type == "cuda" else torch.float32
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
