"""What every verb refuses in the same words and without an output, and one head for all that write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moetools
from moetools.errors import MoetoolsError

OUT = "out"
VERBS: dict[str, dict[str, Any]] = {
    "inspect_routing": {},
    "prune_experts": {OUT: OUT, "keep": 4},
    "merge_experts": {OUT: OUT, "to": 4},
    "route_tasks": {OUT: OUT, "keep": 4},
    "place_experts": {OUT: OUT, "devices": 2},
    "quantize": {OUT: OUT},
    "distill": {OUT: OUT},
    "evaluate": {},
    "compare": {},
    "compress": {OUT: OUT, "target_size": "60%"},
}
each_verb = pytest.mark.parametrize("verb", VERBS)


def refused(verb: str, model: Path, folder: Path, **text: Any) -> MoetoolsError:
    options = dict(VERBS[verb])
    places = [folder / options.pop(OUT)] if OUT in options else []
    with pytest.raises(MoetoolsError) as caught:
        getattr(moetools, verb)(model, *places, **options, **text, device="cpu")
    assert not (folder / OUT).exists()
    return caught.value


@pytest.fixture
def ids(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def write(*tasks: str) -> dict[str, Any]:
        for seed, task in enumerate(tasks):
            numbers = torch.randint(2, 128, (16, 16), generator=torch.Generator().manual_seed(seed))
            save_file({"input_ids": numbers}, tmp_path / f"{task}.safetensors")
        return {"data": {task: tmp_path / f"{task}.safetensors" for task in tasks}, "seq_len": 16}

    return write


@each_verb
def test_no_tokenizer(verb: str, tiny, tmp_path: Path) -> None:
    for task in ("one", "two"):
        (tmp_path / f"{task}.txt").write_text(f"{task} word after another\n" * 50)
    data = {task: tmp_path / f"{task}.txt" for task in ("one", "two")}
    error = refused(verb, tiny("qwen3_moe"), tmp_path, data=data, seq_len=16)
    assert error.message == f"no tokenizer in {tiny('qwen3_moe')}"
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".txt"]


@each_verb
def test_one_number_that_is_none(verb: str, tiny, rewrite, ids, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.5.down_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[7] = float("nan")
        return tensors

    model = rewrite(tiny("qwen3_moe"), spoil)
    error = refused(verb, model, tmp_path, **ids("one", "two"))
    assert error.message == f"{model}: tensor '{name}' has values that are NaN or infinite"


WRITING: dict[str, dict[str, Any]] = {
    "distill": {"local_steps": 0},
    "quantize": {"scheme": "w8a16", "embeddings": "w8a16"},
}


# The copy is packed in `test_a_stored_copy_of_a_tied_head_stays_one`.
@pytest.mark.parametrize(("verb", "copied"), [("distill", True), ("distill", False), ("quantize", False)])
def test_a_head_stored_beside_tied_embeddings(verb: str, copied: bool, tiny, rewrite, ids, tmp_path: Path) -> None:
    """Stock transformers, which verifies each output, ties a copy and leaves another head alone."""

    def with_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embeddings = tensors["model.embed_tokens.weight"]
        return {**tensors, "lm_head.weight": embeddings.clone() if copied else embeddings.flip(0)}

    model = rewrite(tiny("qwen3_moe", tie_word_embeddings=True), with_head)
    getattr(moetools, verb)(model, tmp_path / OUT, **WRITING[verb], **ids("one"), device="cpu")
    found = {}
    for file in (tmp_path / OUT).glob("model*.safetensors"):
        found |= load_file(file)
    if verb != "quantize":
        assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"]) == copied
