"""Scores a prompt with one engine, in that engine's own Python; run by path, and never imports moetools but for itself.

Reads a JSON request from the file named first and writes its JSON answer to the file named second: {"version": ...,
"scores": [log-probability of every token but the first]} and, where the engine tokenizes, {"ids": [...]}.
"""

import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer one request."""
    # The folder of this script is not to be searched for modules.
    del sys.path[0]
    asked, answered = map(Path, sys.argv[1:])
    request = json.loads(asked.read_text())
    try:
        module = importlib.import_module(request["module"])
        answer = ENGINES[request["engine"]](request)
        answer["version"] = version(request["packages"]) or str(getattr(module, "__version__", ""))
    except Exception as error:  # noqa: BLE001 - whatever the engine raises is the answer
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    answered.write_text(json.dumps(answer))


def version(packages: list[str]) -> str:
    """Version of the first of the packages that is installed."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return ""


def transformers_scores(request: dict[str, Any]) -> dict[str, Any]:
    """Stock transformers: `from_pretrained` and one call."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(request["threads"])
    kind = getattr(transformers, request["class"])
    model = kind.from_pretrained(
        request["path"],
        dtype=request["dtype"],
        local_files_only=True,
        trust_remote_code=request["trust_remote_code"],
        **request["attention"],
    )
    device = request["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.tensor([request["ids"]], device=device)
    with torch.no_grad():
        logits = model.to(device).eval()(input_ids=ids, use_cache=False).logits[0].float()
    scores = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return {"scores": scores.tolist()}


def vllm_scores(request: dict[str, Any]) -> dict[str, Any]:
    """vLLM's offline engine, without its tokenizer."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    model = LLM(
        request["path"],
        dtype=request["dtype"],
        trust_remote_code=request["trust_remote_code"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=len(request["ids"]) + 8,
    )
    options = SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)
    rows = model.generate(TokensPrompt(prompt_token_ids=request["ids"]), options)[0].prompt_logprobs
    return {"scores": [rows[place][token].logprob for place, token in enumerate(request["ids"]) if place]}


def sglang_scores(request: dict[str, Any]) -> dict[str, Any]:
    """SGLang's offline engine, without its tokenizer."""
    import sglang

    engine = sglang.Engine(
        model_path=request["path"],
        dtype=request["dtype"],
        trust_remote_code=request["trust_remote_code"],
        skip_tokenizer_init=True,
        context_length=len(request["ids"]) + 8,
        disable_cuda_graph=True,
    )
    found = engine.generate(
        input_ids=request["ids"],
        sampling_params={"temperature": 0, "max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=0,
    )
    engine.shutdown()
    return {"scores": [row[0] for row in found["meta_info"]["input_token_logprobs"]][1:]}


def llama_scores(request: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp through llama-cpp-python; it also says how it tokenizes the prompt."""
    import numpy
    from llama_cpp import Llama

    model = Llama(
        request["path"],
        logits_all=True,
        n_ctx=len(request["ids"]) + 8,
        n_threads=request["threads"],
        n_gpu_layers=0 if request["device"] == "cpu" else -1,
        verbose=False,
    )
    model.eval(request["ids"])
    logits = numpy.asarray(model.scores[: len(request["ids"])], dtype=numpy.float64)
    answer = {"scores": _scores(logits, request["ids"])}
    if request["prompt"] is not None:
        answer["ids"] = model.tokenize(request["prompt"].encode(), add_bos=False, special=False)
    return answer


def mlx_scores(request: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm."""
    import mlx.core as mx
    import numpy
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(request["path"]))
    if request["device"] == "cpu" or not mx.metal.is_available():
        # On a CPU it has kernels for float32 alone.
        mx.set_default_device(mx.cpu)
        model.set_dtype(mx.float32)
    logits = model(mx.array([request["ids"]]))[0].astype(mx.float32)
    return {"scores": _scores(numpy.asarray(logits).astype(numpy.float64), request["ids"])}


def _scores(logits: Any, ids: list[int]) -> list[float]:
    """Log-probability of every token but the first, from the logits [N, V] in front of it."""
    import numpy

    logits = logits[:-1] - logits[:-1].max(1, keepdims=True)
    chosen = logits[numpy.arange(len(ids) - 1), ids[1:]]
    return (chosen - numpy.log(numpy.exp(logits).sum(1))).tolist()


ENGINES = {
    "transformers": transformers_scores,
    "moetools.hf": transformers_scores,
    "vllm": vllm_scores,
    "sglang": sglang_scores,
    "llama.cpp": llama_scores,
    "mlx": mlx_scores,
}

if __name__ == "__main__":
    main()
