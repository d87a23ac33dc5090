"""`compare` against stock transformers' own choices, token by token."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_tiny
from safetensors.torch import save_file
from torch import Tensor

from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import UserError
from moetools.forward.options import ForwardOptions
from moetools.forward.saturation import common_choices
from moetools.forward.streaming import StreamedModel
from moetools.text.options import DataOptions
from moetools.text.tokens import TokenBatch, TokenData
from moetools.verbs.inspect.options import RoutingOptions
from moetools.verbs.inspect.routing import inspect_routing
from moetools.verbs.inspect.saturation import saturation

CPU = ForwardOptions(device="cpu", dtype="float32")


def padded_data() -> TokenData:
    """Two tasks, with and without padding."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for task, real in [(0, (14, 14)), (1, (12, 5, 9))]:
        mask = torch.arange(max(real)) < torch.tensor(real)[:, None]
        ids = torch.where(mask, torch.randint(2, 128, mask.shape, generator=generator), 1)
        padding = None if bool(mask.all()) else mask
        batches.append(TokenBatch(input_ids=ids, attention_mask=padding, task=torch.full((len(real),), task)))
    return TokenData(tasks=("one", "two"), batches=tuple(batches), fingerprint="these", seq_len=14)


def chosen_by_stock(model: Any, data: TokenData) -> dict[int, list[list[set[int]]]]:
    """Layer -> sequence -> token -> experts."""
    seen: dict[int, list[list[set[int]]]] = {}
    for batch in data.batches:
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask.long()
        handles = []
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                kept = seen.setdefault(int(name.split("layers.")[1].split(".")[0]), [])

                def note(_: Any, args: tuple, kwargs: dict, *, kept: list = kept, mask: Tensor = mask) -> None:
                    chosen_BNK = [*args, *kwargs.values()][1].unflatten(0, mask.shape)
                    for row, real in zip(chosen_BNK, mask.bool(), strict=True):
                        kept.append([set(one) for one in row[real].tolist()])

                handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "minimax_m2", "gpt_oss"])
def test_agreement_is_that_of_stock(family: str, tiny: Callable[..., Path], stock: Callable[..., Any]) -> None:
    paths, data = [tiny(family), tiny(family, seed=1)], padded_data()
    one, other = (chosen_by_stock(stock(path), data) for path in paths)
    models = [StreamedModel(open_checkpoint(path), CPU) for path in paths]
    found = saturation(common_choices(*models, data), "other", data.tasks, chance=0.25, seed=0)
    assert sorted(found.layers) == sorted(one)
    for layer, agreement in found.layers.items():
        shares = [
            [len(ours & theirs) / len(ours) for ours, theirs in zip(*sequence, strict=True)]
            for sequence in zip(one[layer], other[layer], strict=True)
        ]
        every = [share for sequence in shares for share in sequence]
        assert agreement.share == pytest.approx(sum(every) / len(every))
        assert agreement.low <= agreement.share <= agreement.high
        for task, mine in (("one", shares[:2]), ("two", shares[2:])):
            flat = [share for sequence in mine for share in sequence]
            assert agreement.tasks[task] == pytest.approx(sum(flat) / len(flat))


def test_a_checkpoint_agrees_with_itself(tiny: Callable[..., Path], tmp_path: Path) -> None:
    ids = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (6, 16), generator=torch.Generator().manual_seed(0))}, ids)
    text = DataOptions(data=[str(ids)], seq_len=16)
    model = tiny("mixtral")
    report = inspect_routing(model, RoutingOptions(compare=model), text, CPU)
    assert report.saturation is not None
    assert all((one.share, one.low, one.high) == (1, 1, 1) for one in report.saturation.layers.values())
    assert report.tables()[-1].rows[0] == ["0", "100.0", "100.0 to 100.0"]
    assert json.loads(json.dumps(report.to_json()))["saturation"]["chance"] == 0.25
    other = make_tiny("mixtral", tmp_path / "other", num_local_experts=4)
    with pytest.raises(
        UserError, match=r"has 3 MoE layers of 4 experts, top-2, .* has 3 MoE layers of 8 experts, top-2"
    ):
        inspect_routing(model, RoutingOptions(compare=other), text, CPU)
    with pytest.raises(UserError, match="there is no `data`"):
        inspect_routing(tmp_path / "none", RoutingOptions(compare=model, stats=ids), DataOptions(), CPU)
