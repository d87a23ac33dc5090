"""moetools: make trained Mixture-of-Experts language models cheap to serve, and prove the result.

Every verb of the command line is a function: `moetools.prune_experts("MODEL", "OUT", keep=8, data="code.jsonl")`. They
return the report that the command prints, and raise `MoetoolsError`. Importing this imports no torch.
"""

import importlib
from typing import Any

from moetools.errors import MoetoolsError as MoetoolsError

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and name in _functions():
        return _functions()[name]
    raise AttributeError(f"module 'moetools' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_functions()} - {"Any", "importlib"})


def _functions() -> dict[str, Any]:
    # By name, because every module of the package may import this one.
    return getattr(importlib.import_module("moetools.api.functions"), "FUNCTIONS", {})
