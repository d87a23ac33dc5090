"""evaluate of an encoder-decoder MoE on prompts with completions, against transformers' own loss."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from moetools.cli.app import run
from moetools.demo import install_demo
from moetools.errors import DataError, UnsupportedModelError, UserError
from moetools.forward.options import ForwardOptions
from moetools.text.options import DataOptions
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate

_FORWARD = ForwardOptions(device="cpu", dtype="float32")
_PAIRS = [
    {"prompt": "The old house stood", "completion": " on a hill above the river."},
    {"prompt": "Two and two", "completion": " is four"},
    {"prompt": "She opened the letter slowly and read it twice before", "completion": " she wept."},
    {"prompt": "Rain", "completion": " fell all night and all the next day, and nobody went out of the house."},
    {"prompt": "A dog that was big", "completion": " ran"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one vocabulary whose experts drop tokens, and their data."""
    root = tmp_path_factory.mktemp("pairs")
    demo = install_demo(root / "demo")
    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 3}
    sparse = {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1, "num_experts": 4, "expert_capacity": 3}
    ids = {"vocab_size": 64 * (len(tokenizer) // 64 + 1), "decoder_start_token_id": 3, "pad_token_id": 1}
    for name, seed in (("one", 0), ("other", 1)):
        torch.manual_seed(seed)
        model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes, **sparse, **ids))
        with torch.no_grad():
            # The shared embeddings are the head too.
            model.shared.weight.mul_(0.3)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in _PAIRS))
    return root


def _stock_logits(path: Path, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and labels of all batches, and the model's own loss proves that they belong together."""
    model = SwitchTransformersForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    sides = [
        [tokenizer(pair[key], add_special_tokens=False).input_ids + end for key in ("prompt", "completion")]
        for pair in _PAIRS
    ]
    found = []
    for start in range(0, len(sides), size):
        some = [[torch.tensor(ids) for ids in pair] for pair in sides[start : start + size]]
        prompts, labels = (
            torch.nn.utils.rnn.pad_sequence(list(side), batch_first=True, padding_value=value)
            for side, value in zip(zip(*some, strict=True), (1, -100), strict=True)
        )
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(pair[0]) for pair in some], batch_first=True)
        with torch.no_grad():
            output = model(input_ids=prompts, attention_mask=mask, labels=labels)
        real = labels.flatten() != -100
        logits = output.logits.flatten(0, 1)[real]
        torch.testing.assert_close(output.loss, functional.cross_entropy(logits, labels.flatten()[real]))
        found.append((logits, labels.flatten()[real]))
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_and_kl_are_stocks(folder: Path, size: int) -> None:
    text = DataOptions(data=[str(folder / "pairs.jsonl")], batch_size=size)
    found = evaluate([folder / "other"], EvaluateOptions(reference=folder / "one"), text, _FORWARD)
    logits, labels = map(torch.cat, zip(*_stock_logits(folder / "one", size), strict=True))
    others = torch.cat([one for one, _ in _stock_logits(folder / "other", size)])
    loss = functional.cross_entropy(logits, labels)
    kl = functional.kl_div(others.log_softmax(1), logits.log_softmax(1), log_target=True, reduction="batchmean")
    one, other = (model.metrics for model in found.models)
    assert one.tasks["pairs"].targets == len(labels)
    assert one.perplexity == pytest.approx(loss.exp().item(), rel=1e-5)
    assert other.perplexity == pytest.approx(functional.cross_entropy(others, labels).exp().item(), rel=1e-5)
    assert other.agreement is not None
    assert other.agreement.kl == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize("part", ["relative_attention_bias.weight", "experts.", "EncDecAttention.k.weight"])
def test_what_is_special_matters(folder: Path, part: str) -> None:
    """The equality above is not one of models in which it could be left out."""
    model = SwitchTransformersForConditionalGeneration.from_pretrained(folder / "one", dtype=torch.float32).eval()
    ids = torch.arange(4, 28).view(2, 12)
    with torch.no_grad():
        before = model(input_ids=ids, decoder_input_ids=ids).logits
        for name, tensor in model.named_parameters():
            tensor.mul_(-2 if part in name else 1)
        assert (model(input_ids=ids, decoder_input_ids=ids).logits - before).abs().max() > 1e-3


def test_experts_drop_tokens(folder: Path) -> None:
    """Capacity is part of what is compared."""
    model = SwitchTransformersForConditionalGeneration.from_pretrained(folder / "one", dtype=torch.float32).eval()
    kept: list[torch.Tensor] = []
    model.encoder.block[1].layer[1].mlp.router.register_forward_hook(lambda *call: kept.append(call[2][0].sum(-1)))
    prompt = AutoTokenizer.from_pretrained(folder / "one")(_PAIRS[2]["prompt"], return_tensors="pt").input_ids
    with torch.no_grad():
        model(input_ids=prompt, decoder_input_ids=prompt)
    assert 0 < kept[0].sum() < kept[0].numel()


def test_text_without_pairs_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl").write_text('{"text": "no pair"}\n')
    with pytest.raises(DataError, match=r"plain\.jsonl:1: an encoder-decoder model reads 'prompt' with 'completion'"):
        evaluate([folder / "one"], EvaluateOptions(), DataOptions(data=[str(tmp_path / "plain.jsonl")]), _FORWARD)


def test_what_is_not_measured_is_refused(folder: Path) -> None:
    text = DataOptions(data=[str(folder / "pairs.jsonl")])
    with pytest.raises(UserError, match="encoder-decoder model, for which `generate` is not measured"):
        evaluate([folder / "one"], EvaluateOptions(generate=4), text, _FORWARD)


def test_a_decoder_beside_it_is_refused(folder: Path) -> None:
    text = DataOptions(data=[str(folder / "pairs.jsonl")])
    with pytest.raises(UserError, match="is an encoder-decoder model, the other is not"):
        evaluate([folder / "one"], EvaluateOptions(reference=folder / "demo" / "model"), text, _FORWARD)


def test_nllb_is_refused_because_stock_uses_two_of_its_experts(tmp_path: Path) -> None:
    """The reason that is given holds: other experts' weights change nothing."""
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
    widths = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16, "num_experts": 4, "vocab_size": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = NllbMoeForConditionalGeneration(NllbMoeConfig(**layers, **widths, **heads)).eval()
    ids = torch.arange(4, 36).view(2, 16)
    chosen: list[torch.Tensor] = []
    router = model.model.encoder.layers[1].ffn.router
    router.register_forward_hook(lambda *call: chosen.append(call[2][0].argmax(-1)))
    with torch.no_grad():
        before = model(input_ids=ids, decoder_input_ids=ids).logits
        for path, tensor in model.named_parameters():
            if "expert_2" in path or "expert_3" in path:
                tensor.mul_(-3)
        after = model(input_ids=ids, decoder_input_ids=ids).logits
    assert chosen[0].max() > 1
    assert torch.equal(before, after)
    model.save_pretrained(tmp_path / "nllb")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(_PAIRS[0]))
    with pytest.raises(UnsupportedModelError, match=r"can only be inspected: transformers 5\.23 sends its tokens to"):
        evaluate([tmp_path / "nllb"], EvaluateOptions(), DataOptions(data=[str(pairs)]), _FORWARD)


@pytest.mark.parametrize(
    "command",
    [
        "prune-experts MODEL OUT --keep 2 --data PAIRS",
        "merge-experts MODEL OUT --to 2 --data PAIRS",
        "route-tasks MODEL OUT --keep 2 --data a=PAIRS --data b=PAIRS",
        "quantize MODEL OUT --scheme w4a16",
        "quantize MODEL OUT --scheme sub1 --data PAIRS",
        "distill MODEL OUT --data PAIRS",
        "inspect-routing MODEL --data PAIRS",
        "place-experts MODEL OUT --devices 2 --data PAIRS",
        "serve-check MODEL",
        "compress MODEL OUT --target-size 100KB --data PAIRS",
    ],
)
def test_other_verbs_refuse_it_before_anything_is_read(
    folder: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("moetools.checkpoint.reader.Checkpoint.read", refuse)
    places = {"MODEL": folder / "one", "OUT": tmp_path / "out", "PAIRS": folder / "pairs.jsonl"}
    for name, path in places.items():
        command = command.replace(name, str(path))
    code = run(command.split())
    assert code == 1
    assert "encoder-decoder model, which can only be inspected and evaluated" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "out").exists()
