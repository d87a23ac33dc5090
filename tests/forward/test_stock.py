"""Disk -> layer -> disk is byte-identical, pruning equals slicing by hand, and what does not fit is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from streamed import open_model, real, stock_logits_of, streamed_logits, token_batch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moetools.architectures.base import find_architecture
from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import CheckpointError, MoetoolsError, UnsupportedModelError
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KEPT = (1, 2, 6, 7)
"""Two experts of each group of [0..3] and [4..7]: legal for every family."""


def file_tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def rewritten(path: Path, select: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    """Every tensor of the checkpoint as moetools would write it, MoE layers through `LayerWeights`."""
    model = open_model(path)
    found = model.checkpoint.read([*model.stock.names[None], *model.stock.extra_names])
    for layer in model.layers(keep_native=True, fill=False):
        if layer.index not in model.stock.moe_layers:
            found |= model.checkpoint.read(model.stock.names[layer.index])
            continue
        weights = model.weights(layer)
        if select is not None:
            weights = weights.select(torch.tensor(select))
        found |= model.stock.disk_tensors(layer.index, layer.native, weights)
    return found


def sliced_by_name(tensors: dict[str, Tensor], kept: tuple[int, ...]) -> dict[str, Tensor]:
    """The pruned checkpoint by the names alone: renumber experts, slice routers and 3-D expert tensors."""
    index = torch.tensor(kept)
    result = {}
    for name, tensor in tensors.items():
        if numbered := re.search(r"\.experts\.(\d+)\.", name):
            old = int(numbered[1])
            if old in kept:
                result[name.replace(numbered[0], f".experts.{kept.index(old)}.")] = tensor
        elif name.endswith("e_score_correction_bias"):
            result[name] = tensor[..., index]
        elif re.search(r"\.(gate|router|router\.layer)\.(weight|bias)$|\.experts\.|\.(in|out)put_linear\.", name):
            result[name] = tensor[index]
        else:
            result[name] = tensor
    return result


def other_dtypes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp32 routers and correction biases and fp16 norms in a bf16 checkpoint."""
    special = r"e_score_correction_bias|(gate|router|router\.layer)\.(weight|bias)$"
    return {
        name: tensor.float() if re.search(special, name) else tensor.half() if "layernorm" in name else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_byte_identical(family, tiny):
    same(rewritten(tiny(family)), file_tensors(tiny(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_keeps_mixed_dtypes(family, tiny, rewrite):
    path = rewrite(tiny(family), other_dtypes)
    same(rewritten(path), file_tensors(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_dtypes_give_stock_logits(family, tiny, rewrite, stock):
    path, batch = rewrite(tiny(family), other_dtypes), token_batch(2, 12, padding=(0, 3))
    for dtype in ("float32", "bfloat16"):
        (logits,) = streamed_logits(open_model(path, dtype=dtype), [batch])
        expected = stock_logits_of(stock(path, getattr(torch, dtype)), batch)
        assert torch.equal(real(batch, logits), real(batch, expected))


def one_odd_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    odd = re.compile(r"layers\.1\..*experts\.3\.(up_proj|w3)\.weight")
    return {name: tensor.float() if odd.search(name) else tensor for name, tensor in tensors.items()}


def test_an_expert_of_another_dtype_keeps_it(tiny, rewrite):
    path = rewrite(tiny("mixtral"), one_odd_expert)
    assert torch.float32 in {tensor.dtype for tensor in file_tensors(path).values()}
    same(rewritten(path), file_tensors(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_equals_slicing_by_hand(family, tiny, tmp_path):
    source = tiny(family)
    written = rewritten(source, KEPT)
    same(written, sliced_by_name(file_tensors(source), KEPT))

    config = open_model(source).arch.with_expert_count(json.loads((source / "config.json").read_text()), len(KEPT))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    pruned, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: len(value) for key, value in info.items()} == dict.fromkeys(info, 0)
    original = AutoModelForCausalLM.from_pretrained(source).state_dict()
    index, smaller = torch.tensor(KEPT), 0
    for name, tensor in pruned.state_dict().items():
        whole = original[name]
        for dim in range(whole.dim()):
            if whole.shape[dim] != tensor.shape[dim]:
                assert (whole.shape[dim], tensor.shape[dim]) == (8, 4)
                whole, smaller = whole.index_select(dim, index), smaller + 1
        assert torch.equal(tensor, whole), name
    assert smaller >= 3 * len(open_model(source).stock.moe_layers)
    batch = token_batch(2, 10)
    (logits,) = streamed_logits(open_model(tmp_path, dtype="bfloat16"), [batch])
    assert torch.equal(logits, stock_logits_of(pruned.eval(), batch))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v2", "gpt_oss", "granitemoe"])
def test_one_expert_loads_in_stock(family, tiny, tmp_path):
    source = tiny(family)
    config = open_model(source).arch.with_expert_count(json.loads((source / "config.json").read_text()), 1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(rewritten(source, (5,)), tmp_path / "model.safetensors", metadata={"format": "pt"})
    dense, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert {key: len(value) for key, value in info.items()} == dict.fromkeys(info, 0)
    batch = token_batch(2, 10)
    (logits,) = streamed_logits(open_model(tmp_path), [batch])
    assert torch.equal(logits, stock_logits_of(dense.eval(), batch))


@pytest.mark.parametrize("name", ["mtp.fc.weight", "something.else"])
def test_what_lies_beside_the_model_is_carried_over(name, tiny, rewrite):
    """Stock transformers loads the model and leaves such a tensor out."""
    path = rewrite(tiny("qwen3_moe"), lambda tensors: {**tensors, name: torch.zeros(4)})
    model = open_model(path)
    model.stock.check_names()
    assert model.stock.extra_names == [name]
    batch = token_batch(1, 6)
    (logits,) = streamed_logits(model, [batch])
    assert torch.equal(
        logits, stock_logits_of(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), batch)
    )


@pytest.mark.parametrize(
    ("plain", "wrapped", "cause"),
    [
        ("", "base_model.model.", "'base_model.model.' in their names is the mark of peft: merge"),
        ("", "module.", "DataParallel"),
        ("self_attn.q_proj.", "self_attn.q_proj.base_layer.", "peft"),
        ("", "_orig_mod.", "torch.compile: save the model itself, `model._orig_mod.save_pretrained"),
        ("", "_orig_mod.module.", "torch.compile"),
        ("layers.1.", "layers.1._orig_mod.", "torch.compile"),
        ("layers.1.mlp.", "layers.1._checkpoint_wrapped_module.mlp.", "activation checkpointing: rename"),
        ("", "policy.", "their names begin with 'policy.': rename"),
    ],
)
def test_a_model_saved_inside_a_wrapper_is_named_as_such(plain, wrapped, cause, tiny, rewrite):
    """And the tensors renamed, as it advises, are the model."""

    def wrap(name):
        return wrapped + name if not plain else name.replace(plain, wrapped)

    source = tiny("qwen3_moe")
    path = rewrite(source, lambda tensors: {wrap(name): one for name, one in tensors.items()})
    with pytest.raises(CheckpointError, match=r"no tensor for|unknown tensors") as found:
        open_model(path).stock.check_names()
    assert cause in found.value.hint
    renamed = rewrite(path, lambda tensors: {name.replace(wrapped, plain): one for name, one in tensors.items()})
    open_model(renamed).stock.check_names()


def test_a_missing_head_may_be_tied(tiny, rewrite):
    """As the hint says."""
    path = rewrite(tiny("qwen3_moe"), lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    with pytest.raises(CheckpointError, match="no tensor for") as found:
        open_model(path).stock.check_names()
    assert "`tie_word_embeddings` to true" in found.value.hint
    open_model(rewrite(path, config={"tie_word_embeddings": True})).stock.check_names()


def test_a_missing_expert_is_seen_in_the_shape(tiny, rewrite):
    one = "model.layers.1.mlp.experts.3.down_proj.weight"
    path = rewrite(tiny("qwen3_moe"), lambda tensors: {n: t for n, t in tensors.items() if n != one})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj \[7, 32, 24\], not \[8, 32, 24\]"):
        open_model(path).stock.check_names()


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_of_every_family_are_known(family, tiny):
    open_model(tiny(family)).stock.check_names()


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.3.extra.weight", "model.layers.0.bonus.weight", "model.something.else"]
)
def test_unknown_tensors_are_refused(name, tiny, rewrite):
    path = rewrite(tiny("qwen3_moe"), lambda tensors: {**tensors, name: torch.zeros(4)})
    with pytest.raises(CheckpointError, match=f"unknown tensors .*{re.escape(name.split('.')[-2])}"):
        open_model(path).stock.check_names()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_missing_tensor_is_noticed(family, tiny, rewrite):
    """One tensor of every kind at a time: without reading weights, and again while reading them."""
    tensors = file_tensors(tiny(family))
    kinds = {re.sub(r"\d+", "#", name): name for name in tensors}
    for name in kinds.values():
        path = rewrite(tiny(family), lambda tensors, name=name: {k: v for k, v in tensors.items() if k != name})
        with pytest.raises(CheckpointError, match=r"no tensor for|another shape|cannot be converted"):
            open_model(path).stock.check_names()


@pytest.mark.parametrize("gone", ["model.norm.weight", "model.layers.2.self_attn.q_proj.weight"])
def test_missing_tensors_are_noticed_while_loading(gone, tiny, rewrite):
    path = rewrite(tiny("mixtral"), lambda tensors: {k: v for k, v in tensors.items() if k != gone})
    with pytest.raises(CheckpointError, match=re.escape(gone)):
        streamed_logits(open_model(path), [token_batch(1, 4)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_shape_is_refused(family, tiny, rewrite):
    for name in {re.sub(r"\d+", "#", name): name for name in file_tensors(tiny(family))}.values():

        def widen(tensors: dict[str, Tensor], name: str = name) -> dict[str, Tensor]:
            return {**tensors, name: torch.cat([tensors[name], tensors[name][..., :1]], dim=-1)}

        with pytest.raises(CheckpointError, match=r"another shape|cannot be converted"):
            open_model(rewrite(tiny(family), widen)).stock.check_names()


def test_config_with_another_expert_count_is_refused(tiny, rewrite):
    with pytest.raises(CheckpointError, match="another shape"):
        open_model(rewrite(tiny("mixtral"), config={"num_local_experts": 6})).stock.check_names()


def test_config_with_fewer_layers_than_there_are_is_refused(tiny, rewrite):
    with pytest.raises(CheckpointError, match="num_hidden_layers 2, but layer 2 is on disk too"):
        open_model(rewrite(tiny("mixtral"), config={"num_hidden_layers": 2}))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "minimax_m2", "ernie4_5_moe"])
def test_prediction_layers_are_extras_and_not_loaded(family, tiny, rewrite, stock):
    mtp = ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight"]
    if family == "ernie4_5_moe":
        mtp.append("model.mtp_block.0.mlp.up_proj.weight")
    path = rewrite(tiny(family), lambda tensors: {**tensors, **{name: torch.randn(3, 5) for name in mtp}})
    model, batch = open_model(path), token_batch(2, 8)
    model.stock.check_names()
    assert sorted(model.stock.extra_names) == sorted(mtp)
    assert torch.equal(streamed_logits(model, [batch])[0], stock_logits_of(stock(tiny(family)), batch))
    same(rewritten(path), file_tensors(path))


def test_stored_rotary_tables_are_extras(tiny, rewrite):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    model = open_model(rewrite(tiny("mixtral"), lambda tensors: {**tensors, name: torch.ones(4)}))
    model.stock.check_names()
    assert model.stock.extra_names == [name]


def test_tensors_that_stock_itself_ignores_are_extras(tiny, rewrite, monkeypatch):
    name = "model.mtp.layers.0.mlp.up_proj.weight"
    path = rewrite(tiny("qwen3_moe"), lambda tensors: {**tensors, name: torch.ones(4)})
    with pytest.raises(CheckpointError, match="unknown tensors"):
        open_model(path).stock.check_names()
    owner = type(open_model(tiny("qwen3_moe")).stock.model)
    monkeypatch.setattr(owner, "_keys_to_ignore_on_load_unexpected", [r"^model\.mtp", r"model\.layers\.1\."])
    model = open_model(path)
    model.stock.check_names()
    assert model.stock.extra_names == [name]
    assert any(name.startswith("model.layers.1.") for name in model.stock.names[1])


def test_a_module_with_weights_and_a_table_keeps_its_weights(tiny):
    """Rotary tables are built by `_init_weights`, which must not touch loaded weights of the same module."""
    model = open_model(tiny("mixtral"))
    embedding = model.stock.decoder.embed_tokens
    embedding.register_buffer("table", torch.zeros(3, device="meta"), persistent=False)
    assert model.skeleton is not None
    assert torch.equal(embedding.weight, file_tensors(tiny("mixtral"))["model.embed_tokens.weight"].float())


def other_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, HEAD: tensors[EMBEDDINGS].flip(0)}


def same_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, HEAD: tensors[EMBEDDINGS].clone()}


def nearly_same_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One that differs in fp32 only."""
    return {**tensors, HEAD: tensors[EMBEDDINGS].float() * (1 + 1e-4)}


def head_alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {HEAD if name == EMBEDDINGS else name: tensor for name, tensor in tensors.items()}


HEADS = {
    "tied, no head": ({"tie_word_embeddings": True}, dict, True),
    "tied, a copy stored": ({"tie_word_embeddings": True}, same_head, True),
    "tied, head without embeddings": ({"tie_word_embeddings": True}, head_alone, True),
    "tied, another head stored": ({"tie_word_embeddings": True}, other_head, False),
    "tied, head differs in fp32": ({"tie_word_embeddings": True}, nearly_same_head, False),
    "untied": ({"tie_word_embeddings": False}, other_head, False),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_is_tied_where_stock_ties_it(case, tiny, rewrite):
    config, change, tied = HEADS[case]
    path, batch = rewrite(tiny("qwen2_moe"), change, config=config), token_batch(2, 9)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert (reference.lm_head.weight is reference.model.embed_tokens.weight) == tied
    model = open_model(path)
    model.stock.check_names()
    assert (model.stock.model.lm_head.weight is model.stock.model.model.embed_tokens.weight) == tied
    (logits,) = streamed_logits(model, [batch])
    assert torch.equal(logits, stock_logits_of(reference, batch))
    assert (model.stock.model.lm_head.weight is model.stock.model.model.embed_tokens.weight) == tied


def test_heads_that_differ_in_fp32_only_are_tied_in_bf16(tiny, rewrite):
    path = rewrite(tiny("qwen2_moe"), nearly_same_head)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    batch = token_batch(2, 9)
    (logits,) = streamed_logits(open_model(path, dtype="bfloat16"), [batch])
    assert torch.equal(logits, stock_logits_of(reference, batch))


@pytest.mark.parametrize("infinity", [{"__float__": "Infinity"}, float("inf")])
def test_infinity_in_config_json(infinity, tiny, rewrite, stock):
    """As transformers saves it, and as Python's json does."""
    path, batch = rewrite(tiny("qwen3_moe"), config={"unused_limit": [0.0, infinity]}), token_batch(2, 6)
    assert open_model(path).stock.model.config.unused_limit == [0.0, float("inf")]
    (logits,) = streamed_logits(open_model(path), [batch])
    assert torch.equal(logits, stock_logits_of(stock(tiny("qwen3_moe")), batch))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def refused(path: Path, **options: bool) -> MoetoolsError:
    with pytest.raises(UnsupportedModelError) as caught:
        StreamedModel(open_checkpoint(path), ForwardOptions(device="cpu", **options))
    return caught.value


def test_dense_models_run_but_are_no_mixture(llama, rewrite):
    assert not StreamedModel(open_checkpoint(llama), ForwardOptions(device="cpu")).stock.moe_layers
    with pytest.raises(UnsupportedModelError, match="'llama' is not a Mixture-of-Experts model"):
        find_architecture(open_checkpoint(llama).config)
    assert "'llama'" in refused(rewrite(llama, config={"num_experts": 8})).message


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        ({"model_type": "moe_of_tomorrow"}, "knows no model_type 'moe_of_tomorrow'", "newer transformers"),
        ({"model_type": None}, "config.json has no model_type", "Hugging Face"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "a.B"}}, "its own Python code", "`trust_remote_code`"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)", "plain checkpoint"),
        ({"num_local_experts": None, "num_experts": None}, "counts no experts", "MoE"),
        ({"hidden_act": "many"}, "config.json: KeyError", ""),
    ],
)
def test_configs_that_cannot_be_handled(config, message, hint, tiny, rewrite):
    error = refused(rewrite(tiny("mixtral"), config=config))
    assert re.search(message, error.message)
    assert hint in error.hint
