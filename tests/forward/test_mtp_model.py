"""Multi-token-prediction modules run as in stock transformers."""

from pathlib import Path

import pytest
import torch
from mtp_models import LAYERS, make_mtp, stock_drafts

from moetools.architectures.mtp import find_mtp
from moetools.formats.reader import open_model
from moetools.forward.mtp import MtpModel, find_modules, run_module, run_trunk, shifted
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.text.tokens import TokenBatch, TokenData

CPU = ForwardOptions(device="cpu", dtype="float32")


def text(size: int = 2, length: int = 12) -> TokenData:
    ids = torch.randint(2, 128, (size, length), generator=torch.Generator().manual_seed(5))
    batch = TokenBatch(input_ids=ids, attention_mask=None, task=torch.zeros(size, dtype=torch.int64))
    return TokenData(tasks=("text",), batches=(batch,), fingerprint="", seq_len=length)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_drafts_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    path, data = make_mtp(family, tmp_path / "model"), text()
    model = StreamedModel(open_model(path), CPU)
    tensors = find_mtp(model.stock.extra_names, model.checkpoint.tensors, model.arch, model.config)
    assert tensors is not None
    (module,) = find_modules(model, tensors)
    assert module.layer == LAYERS
    plan = model.memory_plan(data.batches)
    with torch.no_grad():
        trunk = run_trunk(model, data.batches, plan)
        mtp = MtpModel(module, CPU)
        mtp.stock.check_names()
        mtp.behind(trunk.hidden)
        batches = shifted(data).batches
        drafts = run_module(mtp, mtp.stock.read_layer(0), batches, plan)
        logits = mtp.stock.model.lm_head(drafts.hidden[0])
    wanted, wanted_trunk = stock_drafts(path, data.batches[0].input_ids)
    assert torch.allclose(logits, wanted, atol=2e-5)
    assert torch.equal(drafts.top[0], wanted.argmax(-1))
    assert torch.equal(trunk.top[0], wanted_trunk.argmax(-1))
