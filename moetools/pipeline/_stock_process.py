"""Loads checkpoints with stock transformers in a process that never imports moetools; run by path, see `stock_process`.

Reads one JSON request per line and answers with one line: {"digests": {name: digest}, "bad": {...}} or {"error": text};
logits go to a file.
"""

import contextlib
import hashlib
import io
import json
import sys
import warnings

import torch
import transformers
from safetensors.torch import save_file

_PIECE_BYTES = 1 << 24


def main() -> None:
    """Answer until the other end hangs up."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    answers = sys.stdout
    for line in sys.stdin:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                answer = check(json.loads(line))
        except Exception as error:  # noqa: BLE001 - whatever stock code raises is the answer
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def check(request: dict) -> dict:
    """Load a checkpoint; digest every tensor in the dtype asked for, and run a probe batch."""
    assert not any(name.partition(".")[0] == "moetools" for name in sys.modules), "this process must not know moetools"
    torch.set_num_threads(request["threads"])
    model, info = getattr(transformers, request["class"]).from_pretrained(
        request["path"],
        dtype=request["dtype"],
        local_files_only=True,
        trust_remote_code=request["trust_remote_code"],
        output_loading_info=True,
        **request["attention"],
    )
    model.eval()
    mask = None if request["mask"] is None else torch.tensor(request["mask"])
    with torch.no_grad():
        # compressed-tensors unpacks linear layers when they are first used.
        logits = model(input_ids=torch.tensor(request["ids"]), attention_mask=mask, use_cache=False).logits
    save_file({"logits": logits.contiguous()}, request["logits"])
    state = model.state_dict()
    wanted = {name: getattr(torch, dtype) for name, dtype in request["dtypes"].items()}
    bad = {key: [str(one) for one in sorted(info[key], key=str)[:3]] for key in info if info[key]}
    return {
        "digests": {name: digest(state[name].to(dtype)) for name, dtype in wanted.items() if name in state},
        "bad": bad,
    }


def digest(tensor: torch.Tensor) -> str:
    """As `moetools.pipeline.verification.digest`."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    whole = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    for start in range(0, len(content), _PIECE_BYTES):
        whole.update(hashlib.sha256(content[start : start + _PIECE_BYTES]).digest())
    return whole.hexdigest()


if __name__ == "__main__":
    main()
