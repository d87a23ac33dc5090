"""The experts' backward pass against stock transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moetools.training.experts import use_trainable_experts


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_experts_and_their_gradients_equal_stock(tiny: Callable[..., Path], family: str) -> None:
    ids = torch.randint(2, 128, (3, 24), generator=torch.Generator().manual_seed(5))
    found = []
    for ours in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
        model.set_experts_implementation("eager")
        if ours:
            use_trainable_experts(model)
        logits = model(input_ids=ids, use_cache=False).logits
        logits.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if "experts." in n or "gate.weight" in n}
        found.append((logits.detach(), grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][name], rtol=1e-3, atol=1e-6)
