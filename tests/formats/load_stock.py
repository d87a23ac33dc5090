"""Run alone, without moetools: loads pairs of a packed and a plain checkpoint with stock transformers and compares.

Arguments: folders with `packed/`, `plain/` and `job.json` each; one JSON line of result per folder.
"""

import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
IDS = torch.arange(24).reshape(2, 12) % 100


def run(path: Path, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    bad = {kind: sorted(names)[:3] for kind, names in info.items() if names and kind != "error_msgs"}
    assert not bad, bad
    with torch.no_grad():
        logits = model.eval()(IDS, use_cache=False).logits
    return model.state_dict(), logits


def compare(job: Path) -> dict:
    dtype = getattr(torch, json.loads((job / "job.json").read_text())["dtype"])
    plain, expected = run(job / "plain", dtype)
    with contextlib.redirect_stderr(io.StringIO()):
        packed, logits = run(job / "packed", dtype)
    wrong = [name for name in plain if name not in packed or not torch.equal(plain[name], packed[name].to(plain[name]))]
    return {"wrong": wrong, "tensors": len(plain), "logits": torch.equal(logits, expected)}


for job in map(Path, sys.argv[1:]):
    try:
        result = compare(job)
    except Exception as error:  # noqa: BLE001 - reported to the test
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"job": job.name, **result}), flush=True)  # noqa: T201
assert "moetools" not in sys.modules
