"""Candidates of a layer compared and refitted, in any memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moetools.checkpoint.reader import open_checkpoint
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.passes.layer_reduction import LayerReducer, ReducedLayer
from moetools.passes.recipes import Candidate, candidates_for
from moetools.passes.two_streams import streams_plan
from moetools.text.tokens import TokenBatch, TokenData

CPU = ForwardOptions(device="cpu")
FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe"]


@pytest.fixture
def data() -> TokenData:
    generator = torch.Generator().manual_seed(5)
    task = torch.zeros(7, dtype=torch.int64)
    ids = [torch.randint(2, 128, (7, 24), generator=generator) for _ in range(4)]
    batches = tuple(TokenBatch(input_ids=one, attention_mask=None, task=task) for one in ids)
    return TokenData(tasks=("t",), batches=batches, fingerprint="x", seq_len=24)


def first_layer(path: Path, data: TokenData, candidates: tuple[Candidate, ...]) -> ReducedLayer:
    checkpoint = open_checkpoint(path)
    model = StreamedModel(checkpoint, CPU)
    config = model.arch.with_expert_count(checkpoint.config, 4)
    reducer = LayerReducer(
        candidates=candidates,
        arch=model.arch,
        keep=4,
        num_groups=model.arch.num_groups(config),
        seed=0,
        statistics=None,
        protected={},
    )
    smaller = StreamedModel(checkpoint, CPU, config=config)
    plan = streams_plan(model, smaller, data, (), sample_tokens=64)
    with torch.inference_mode():
        layers = reducer.stream_by_stream(model, smaller, data, plan)
        return next(layer for layer in layers if layer.decision is not None)


def refit_of(layer: ReducedLayer) -> Any:
    assert layer.decision is not None
    return layer.decision.details["refit"]


@pytest.mark.parametrize("verb", ["prune", "merge"])
def test_auto_is_the_candidate_with_the_least_trial_error(
    verb: str, tiny: Callable[..., Path], data: TokenData
) -> None:
    path, candidates = tiny("mixtral"), candidates_for(verb, "auto", {})
    layer = first_layer(path, data, candidates)
    assert layer.decision is not None
    errors: Any = layer.decision.details["candidates"]
    assert list(errors) == [candidate.name for candidate in candidates]
    assert len(set(errors.values())) > 1
    best = min(errors, key=lambda name: errors[name])
    assert layer.decision.details["candidate"] == best
    (chosen,) = (candidate for candidate in candidates if candidate.name == best)
    alone = first_layer(path, data, (chosen,))
    assert alone.decision is not None
    assert layer.decision.clusters == alone.decision.clusters
    for name, tensor in alone.tensors.items():
        assert torch.equal(layer.tensors[name], tensor)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings", [("joint", {}), ("m-smoe", {"refit": "joint", "sequential": True}), ("mergemoe", {"sequential": True})]
)
def test_a_refit_lowers_the_error_and_little_memory_changes_it_little(
    family: str,
    settings: tuple[str, dict[str, Any]],
    tiny: Callable[..., Path],
    data: TokenData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With nothing kept between passes, and preconditioner blocks and outputs in small parts."""
    path, candidates = tiny(family), candidates_for("merge", *settings)
    kept = first_layer(path, data, candidates)
    assert refit_of(kept)["held_out_after"] <= refit_of(kept)["held_out_before"]
    monkeypatch.setattr("moetools.forward.memory.MemoryPlan.activation_budget", property(lambda _: 0))
    monkeypatch.setattr("moetools.forward.memory.MemoryPlan.spare", property(lambda _: 48_000))
    small = first_layer(path, data, candidates)
    assert refit_of(small)["held_out_before"] == pytest.approx(refit_of(kept)["held_out_before"], rel=0.2)
    assert refit_of(small)["held_out_after"] == pytest.approx(refit_of(kept)["held_out_after"], rel=0.1)
