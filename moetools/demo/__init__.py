"""The embedded demo: a really trained small MoE, text for its four tasks (calibration, held-out), choice items.

Importing this needs neither torch nor transformers. `tests/demo/making` is how the files were made.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from moetools.errors import UserError

_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class InstalledDemo:
    """Where `install_demo` put its two folders."""

    model: Path
    data: Path


def demo_model_path() -> Path:
    """The folder of the embedded checkpoint (family qwen2_moe, bf16), readable by stock transformers."""
    return _HERE / "model"


def demo_data_path() -> Path:
    """The folder of the embedded text: `<task>/{calibration,test}.jsonl` and `choice/<task>.jsonl`."""
    return _HERE / "data"


def install_demo(directory: Path | str) -> InstalledDemo:
    """Copies the checkpoint to DIRECTORY/model and the text to DIRECTORY/data.

    Raises UserError where either exists already, or DIRECTORY is a file: nothing is overwritten.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is not a folder", hint="name a new directory for the demo")
    installed = InstalledDemo(model=target / "model", data=target / "data")
    for path in (installed.model, installed.data):
        if path.exists():
            raise UserError(
                f"the demo cannot be copied to {target}: {path} exists already",
                hint="name a new directory, or remove that one first",
            )
    target.mkdir(parents=True, exist_ok=True)
    shutil.copytree(demo_model_path(), installed.model)
    shutil.copytree(demo_data_path(), installed.data)
    return installed
