import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, make_tiny, stock_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import CheckpointError, UserError
from moetools.forward.evaluate import ChoiceData, Evaluator, compare
from moetools.forward.metrics import PERCENTILES, correlation, score_rows
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.text.choices import ChoiceItem, ChoiceSet, choice_batches
from moetools.text.tokenizer import load_tokenizer
from moetools.text.tokens import TokenBatch, TokenData, pad_right

SHARED = Path(__file__).parents[2].parent / "shared"
MODEL = SHARED / "models" / "mixtral-8x9m"
needs_shared = pytest.mark.skipif(not MODEL.is_dir(), reason="the reference model and its data are not here")
CPU = ForwardOptions(device="cpu", dtype="float32")


def streamed(path: Path, **options: object) -> StreamedModel:
    return StreamedModel(open_checkpoint(path), ForwardOptions(device="cpu", dtype="float32", **options))


def perturb(model: Path, out: Path, scale: float) -> Path:
    """A copy of a one-file checkpoint with Gaussian noise on every matrix."""
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(model / "model.safetensors")
    noisy = {
        name: (tensor + scale * torch.randn(tensor.shape, generator=generator) * tensor.float().std()).to(tensor.dtype)
        if tensor.dim() > 1
        else tensor
        for name, tensor in tensors.items()
    }
    out.mkdir()
    save_file(noisy, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((model / "config.json").read_bytes())
    return out


def ragged_data(vocab: int = 128) -> TokenData:
    """Two tasks of different size, sequences of different lengths, one batch without padding."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for task, lengths in [(0, (5, 9, 2)), (0, (7, 7)), (1, (12, 3))]:
        ids, mask = pad_right([torch.randint(2, vocab, (n,), generator=generator) for n in lengths], 1)
        batches.append(TokenBatch(input_ids=ids, attention_mask=mask, task=torch.full((len(lengths),), task)))
    return TokenData(tasks=("a", "b"), batches=tuple(batches), fingerprint="x", seq_len=12)


def by_hand(reference: Path, model: Path, data: TokenData) -> dict[str, dict[str, np.ndarray]]:
    """Per token and task: both log-likelihoods, KL, equal most likely tokens; sequence by sequence, fp64."""
    found = {task: {"ref": [], "log_prob": [], "kl": [], "same": []} for task in data.tasks}
    for batch in data.batches:
        for row, ids in enumerate(batch.input_ids):
            real = ids if batch.attention_mask is None else ids[batch.attention_mask[row]]
            p = stock_logits(reference, real[None])[0, :-1].double().log_softmax(-1)
            q = stock_logits(model, real[None])[0, :-1].double().log_softmax(-1)
            into = found[data.tasks[int(batch.task[row])]]
            into["ref"].append(p.gather(1, real[1:, None])[:, 0])
            into["log_prob"].append(q.gather(1, real[1:, None])[:, 0])
            into["kl"].append((p.exp() * (p - q)).sum(-1))
            into["same"].append(p.argmax(-1) == q.argmax(-1))
    return {task: {key: torch.cat(parts).numpy() for key, parts in values.items()} for task, values in found.items()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    original = make_tiny("mixtral", folder / "original")
    return original, perturb(original, folder / "noisy", 0.3)


def test_all_metrics_equal_stock_transformers_in_fp64(pair):
    data = ragged_data()
    reference, model = compare(streamed(pair[0]), {"noisy": streamed(pair[1])}, data).values()
    expected = by_hand(*pair, data)
    for task, hand in expected.items():
        assert model.tasks[task].targets == len(hand["kl"]) == {"a": 13 + 12, "b": 13}[task]
        assert model.tasks[task].perplexity == pytest.approx(math.exp(-hand["log_prob"].mean()), rel=1e-5)
        assert reference.tasks[task].perplexity == pytest.approx(math.exp(-hand["ref"].mean()), rel=1e-5)
        found = model.tasks[task].agreement
        assert found.kl == pytest.approx(hand["kl"].mean(), rel=1e-4)
        assert found.kl_max == pytest.approx(hand["kl"].max(), rel=1e-4)
        assert found.top1 == hand["same"].mean()
        assert found.correlation == pytest.approx(np.corrcoef(hand["ref"], hand["log_prob"])[0, 1], abs=1e-5)
    assert model.perplexity == pytest.approx(
        math.exp(-np.mean([hand["log_prob"].mean() for hand in expected.values()])), rel=1e-5
    )
    assert model.agreement.kl == pytest.approx(np.mean([hand["kl"].mean() for hand in expected.values()]), rel=1e-4)
    assert model.agreement.top1 == pytest.approx(np.mean([hand["same"].mean() for hand in expected.values()]))
    pooled = np.concatenate([hand["kl"] for hand in expected.values()])
    for name in PERCENTILES:
        assert model.agreement.kl_percentiles[name] == pytest.approx(np.percentile(pooled, float(name)), rel=1e-4)
    assert 0 < model.agreement.top1 < 1
    assert model.agreement.kl > 0.01


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_perplexity_of_every_family_equals_stock(tmp_path, family):
    path = make_tiny(family, tmp_path / "model")
    data = ragged_data()
    found = Evaluator(data).measure(streamed(path))
    assert found.agreement is None
    expected = by_hand(path, path, data)
    for task, hand in expected.items():
        assert found.tasks[task].perplexity == pytest.approx(math.exp(-hand["log_prob"].mean()), rel=1e-4)


def test_identical_models_agree_exactly(pair):
    reference, same = compare(streamed(pair[0]), {"same": streamed(pair[0])}, ragged_data()).values()
    for found in (reference.agreement, same.agreement, *(task.agreement for task in same.tasks.values())):
        assert found.kl == found.kl_max == 0.0
        assert set(found.kl_percentiles.values()) == {0.0}
        assert found.top1 == 1.0
        assert found.correlation == pytest.approx(1.0, abs=1e-12)
    assert same.perplexity == reference.perplexity


def test_several_models_share_the_reference_and_do_not_influence_each_other(pair):
    data = ragged_data()
    alone = compare(streamed(pair[0]), {"noisy": streamed(pair[1])}, data)["noisy"]
    both = compare(streamed(pair[0]), {"same": streamed(pair[0]), "noisy": streamed(pair[1])}, data)
    assert list(both) == ["reference", "same", "noisy"]
    assert both["noisy"].tasks == alone.tasks
    assert both["same"].agreement.kl == 0.0


def test_small_budget_spills_and_changes_nothing(pair, monkeypatch):
    data = ragged_data()
    whole = compare(streamed(pair[0]), {"noisy": streamed(pair[1])}, data)["noisy"]
    monkeypatch.setattr("moetools.forward.evaluate.head_rows", lambda *_: 1)
    plan = streamed(pair[0]).memory_plan(data.batches)
    least = 2 * plan.rest + plan.layer + plan.workspace
    models = [streamed(path, memory_budget=least) for path in pair]
    evaluator = Evaluator(data, reference=models[0])
    spilled = evaluator.measure(models[1])
    assert evaluator._reference_pass.activations.spilled
    assert spilled.agreement.kl == pytest.approx(whole.agreement.kl, rel=1e-5)
    assert spilled.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    with pytest.raises(UserError, match="memory budget"):
        Evaluator(data, reference=models[0]).measure(streamed(pair[1], memory_budget=least - 1))


@needs_shared
def test_agrees_with_the_judge_on_the_shared_model(tmp_path):
    """The formulas of tools/judge.py on the first windows of two tasks, packed as it packs them."""
    noisy = perturb(MODEL, tmp_path / "noisy", 0.05)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"))
    texts = {}
    for task in ("code", "german"):
        ids = []
        for line in (SHARED / "data" / task / "test.jsonl").read_text(encoding="utf8").splitlines()[:40]:
            ids += [0, *tokenizer(json.loads(line)["text"])["input_ids"]]
        texts[task] = torch.tensor(ids[: 4 * 256]).view(4, 256)
    batches = tuple(
        TokenBatch(input_ids=ids, attention_mask=None, task=torch.full((4,), number))
        for number, ids in enumerate(texts.values())
    )
    data = TokenData(tasks=tuple(texts), batches=batches, fingerprint="x", seq_len=256)
    found = compare(streamed(MODEL), {"noisy": streamed(noisy)}, data)["noisy"]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (MODEL, noisy)]
    for task, ids in texts.items():
        with torch.no_grad():
            p, q = (torch.log_softmax(model(ids, use_cache=False).logits[:, :-1], -1) for model in models)
        loss = -q.gather(-1, ids[:, 1:, None]).double().mean().item()
        assert found.tasks[task].perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        kl = (p.exp() * (p - q)).sum(-1).double().mean().item()
        assert found.tasks[task].agreement.kl == pytest.approx(kl, abs=1e-5)
        assert found.tasks[task].agreement.top1 == pytest.approx(
            (p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=1e-3
        )
    assert found.size.nbytes == (noisy / "model.safetensors").stat().st_size
    assert found.size.parameters == sum(parameter.numel() for parameter in models[1].parameters())
    assert found.size.expert_parameters == 4 * 8 * 3 * 192 * 384
    assert found.size.bits_per_parameter == pytest.approx(16, abs=0.1)


@needs_shared
def test_choices_equal_scoring_each_item_alone():
    lines = (SHARED / "data" / "choice" / "grammar.jsonl").read_text(encoding="utf8").splitlines()[:30]
    records = [json.loads(line) for line in lines]
    items = tuple(
        ChoiceItem(prompt=one["prompt"], choices=tuple(one["choices"]), answer=one["answer"]) for one in records
    )
    choices = ChoiceSet(name="grammar", items=items)
    tokenizer = load_tokenizer(MODEL, vocab_size=4096)
    batches = tuple(choice_batches(choices, tokenizer, seq_len=256, batch_size=7))
    found = Evaluator(None, choices=[ChoiceData(choices=choices, batches=batches)]).measure(streamed(MODEL))
    stock = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    right = 0
    for item in items:
        prompt, scores = tokenizer(item.prompt, add_special_tokens=False)["input_ids"], []
        for text in item.choices:
            ids = tokenizer(item.prompt + text, add_special_tokens=False)["input_ids"]
            shared = next(
                (i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids))
            )
            with torch.no_grad():
                log_prob = stock(torch.tensor([[0, *ids]]), use_cache=False).logits[0].double().log_softmax(-1)
            scores.append(sum(log_prob[i, ids[i]].item() for i in range(shared, len(ids))) / len(text.encode()))
        right += int(np.argmax(scores)) == item.answer
    accuracy = right / 30
    assert found.choices["grammar"].items == 30
    assert found.choices["grammar"].accuracy == accuracy
    assert found.choices["grammar"].standard_error == pytest.approx((accuracy * (1 - accuracy) / 30) ** 0.5)
    assert found.perplexity is None
    assert found.tasks == {}
    assert found.tokens_per_second > 0
    assert found.peak_memory > 0


def test_other_vocabulary_is_refused_with_both_sizes(pair, tmp_path):
    larger = make_tiny("mixtral", tmp_path / "larger", vocab_size=136)
    with pytest.raises(UserError, match=r"136 tokens.*128"):
        compare(streamed(pair[0]), {"larger": streamed(larger)}, ragged_data())


def test_logits_that_are_not_finite_are_refused(pair, tmp_path):
    broken = perturb(pair[0], tmp_path / "broken", 0.0)
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"][7] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' has values that are NaN or infinite"):
        Evaluator(ragged_data()).measure(streamed(broken))


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_divergence_is_exact_for_extreme_logits(shift):
    """Rows far from zero, and rows nearly certain, against fp64."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(6, 500, generator=generator) * torch.tensor([0.1, 1, 5, 20, 80, 300])[:, None] + shift).float()
    y = x + torch.randn(6, 500, generator=generator)
    target = torch.randint(500, (6,), generator=generator)
    p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
    reference, model = score_rows([x.clone(), y.clone()], target)
    torch.testing.assert_close(model.kl_R, (p.exp() * (p - q)).sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.log_prob_R, q.gather(1, target[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    assert model.same_top_R.tolist() == (p.argmax(1) == q.argmax(1)).tolist()
    assert reference.kl_R.tolist() == [0.0] * 6


def test_correlation_needs_variation():
    x = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    assert correlation(x, -x) == pytest.approx(-1.0)
    assert correlation(x, torch.ones_like(x)) is None
