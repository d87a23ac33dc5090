import json
from pathlib import Path

import pytest
import torch
from families import make_tiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from moetools.errors import CheckpointError, DataError, GateError, UserError
from moetools.forward.options import ForwardOptions
from moetools.printable import in_html
from moetools.text.options import DataOptions
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import Evaluation, gate_metrics, metric_value, parse_gate
from moetools.verbs.evaluate.verb import evaluate as run

CPU = ForwardOptions(device="cpu", dtype="float32")
WORDS = [f"w{i}" for i in range(128)]


def evaluate(models: list[Path], data: DataOptions | None, **asked: object) -> Evaluation:
    return run(models, EvaluateOptions(**asked), data or DataOptions(), CPU)


def write_tokenizer(path: Path, words: list[str]) -> None:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[1]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": words[0], "pad_token": words[1]}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def make_model(path: Path, *, seed: int = 0, words: list[str] = WORDS, **overrides: object) -> Path:
    make_tiny("mixtral", path, seed=seed, **overrides)
    write_tokenizer(path, words)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    original, other = make_model(folder / "original"), make_model(folder / "other")
    tensors = load_file(other / "model.safetensors")
    torch.manual_seed(1)
    tensors["lm_head.weight"] += torch.randn_like(tensors["lm_head.weight"]) * 0.1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return original, other


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    for name, step in (("a", 3), ("b", 7)):
        (folder / f"{name}.txt").write_text(" ".join(WORDS[2 + i * step % 120] for i in range(150)))
    items = [{"prompt": f"w{i} w9", "choices": [f" w{i + 5}", f" w{i + 11} w4"], "answer": i % 2} for i in range(9)]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return {name: str(folder / name) for name in ("a.txt", "b.txt", "quiz.jsonl")}


@pytest.fixture
def data(inputs) -> DataOptions:
    return DataOptions(data=[inputs["a.txt"], inputs["b.txt"]], seq_len=16)


def test_tables_and_json_with_reference(models, data, inputs):
    result = evaluate([models[0], models[1]], data, reference=models[0], choices=[inputs["quiz.jsonl"]])
    main, percentiles, choices = result.tables()
    assert main.columns == [
        *("Model", "Experts", "Parameters", "MB", "PPL a", "PPL b", "PPL mean", "KL mean", "KL 99 %", "Top-1 %"),
        *("Tokens/s", "Peak memory"),
    ]
    assert [row[0] for row in main.rows] == ["original (reference)", "other"]
    assert main.rows[0][7:10] == ["0.0000", "0.0000", "100.0"]
    assert float(main.rows[1][7]) > 0
    assert [row[:2] for row in percentiles.rows] == [["other", "a"], ["other", "b"], ["other", "all"]]
    assert choices.columns == ["Model", "quiz (9)"]
    stored = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert [model["reference"] for model in stored["models"]] == [True, False]
    assert stored["models"][1]["experts"] == 8
    assert stored["models"][1]["nbytes"] == (models[1] / "model.safetensors").stat().st_size
    assert stored["models"][1]["agreement"]["kl_percentiles"].keys() == {"50", "90", "95", "99", "99.9"}
    assert stored["models"][1]["choices"]["quiz"]["items"] == 9


def test_without_reference_there_is_no_kl(models, data):
    result = evaluate(models, data)
    (table,) = result.tables()
    assert not [column for column in table.columns if "KL" in column or "Top" in column]
    assert [row[0] for row in table.rows] == ["original", "other"]
    assert result.to_json()["models"][0]["agreement"] is None


def test_a_model_against_itself_is_exact(models, data):
    reference, same = evaluate([models[0]], data, reference=models[0], gate=["kl<=0", "top1>=1"]).models
    assert same.metrics.agreement.kl == 0.0
    assert same.metrics.tasks == reference.metrics.tasks


def test_questions_alone(models, inputs):
    result = evaluate([models[0]], None, choices=[inputs["quiz.jsonl"]], gate=["accuracy.quiz>=0"])
    assert [table.title for table in result.tables()] == ["Evaluation", "Multiple choice, % right (items)"]
    assert result.to_json()["models"][0]["perplexity"] is None


def test_questions_are_named_by_the_option_like_data(models, inputs):
    found = evaluate([models[0]], None, choices=[f"code={inputs['quiz.jsonl']}"], gate=["accuracy.code>=0"])
    plain = evaluate([models[0]], None, choices=[inputs["quiz.jsonl"]])
    assert found.models[0].metrics.choices["code"].accuracy == plain.models[0].metrics.choices["quiz"].accuracy


def test_an_evaluation_reads_all_the_text_and_not_the_default_budget(models, data, monkeypatch):
    monkeypatch.setattr("moetools.text.budget.DEFAULT_TOKENS", 32)
    found = evaluate([models[0]], data)
    # 150 words and a separator fill at least 9 windows of 16 tokens, of which the budget allows one per task.
    assert min(task.targets for task in found.models[0].metrics.tasks.values()) >= 9 * 15


def test_missed_gates_are_listed_and_carry_the_evaluation(models, data):
    with pytest.raises(GateError) as caught:
        evaluate([models[1]], data, reference=models[0], gate=["kl <= 1e-9", "bytes<10MB", "top1>=2", "perplexity>0"])
    assert caught.value.exit_code == 3
    found = caught.value.result
    kl = found.models[1].metrics.agreement.kl
    assert caught.value.message.startswith(f"other: kl <= 1e-9 is missed with {kl:.6g}; other: top1>=2 is missed with")
    assert [result.passed for result in found.gates] == [False, True, False, True]
    assert {result.model for result in found.gates} == {"other"}


def test_every_gate_metric_has_a_value(models, data, inputs):
    asked = {"choices": [inputs["quiz.jsonl"]], "generate": 5, "prompts": 2, "prompt_tokens": 4, "sampled": 3}
    result = evaluate([models[1]], data, reference=models[0], **asked)
    metrics, generation = result.models[1].metrics, result.models[1].generation
    legal = gate_metrics(["a", "b"], ["quiz"], has_reference=True, generates=True, samples=True)
    values = {name: metric_value(result.models[1], name) for name in legal}
    assert values["looping"] == generation.looping
    assert values["agreed"] == generation.agreed < 1
    assert result.models[0].generation.agreed == result.models[0].generation.same_start == 1
    assert {"Greedy continuations", "Sampled continuations"} <= {table.title for table in result.tables()}
    sampled = result.models[1].sampled
    assert (values["sampled.length"], sampled.prompts) == (sampled.length, 3 * generation.prompts)
    assert result.models[0].sampled.agreed == 1
    assert values["kl.b"] == metrics.tasks["b"].agreement.kl
    assert values["top1.a"] == metrics.tasks["a"].agreement.top1
    assert values["perplexity.a"] == metrics.tasks["a"].perplexity
    assert values["kl_p99.9"] == metrics.agreement.kl_percentiles["99.9"]
    assert values["kl_max"] == metrics.agreement.kl_max
    assert values["accuracy.quiz"] == metrics.choices["quiz"].accuracy
    assert values["bytes"] == metrics.size.nbytes


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"generate": 0}, "`generate=0` is below 1"),
        ({"generate": 4, "prompts": 0}, "`prompts=0` is below 1"),
        ({"generate": 4, "prompt_tokens": 10_000}, "no text is longer than `prompt_tokens=10000`"),
        ({"gate": ["looping<=0.1"]}, "unknown gate metric 'looping'"),
        ({"generate": 4, "gate": ["sampled.looping<=0.1"]}, "unknown gate metric 'sampled.looping'"),
        ({"sampled": 2}, "no length is given"),
        ({"generate": 4, "temperature": 0.5}, "are for drawn continuations"),
        ({"generate": 4, "sampled": 1, "temperature": 0}, "`temperature=0` is not above 0"),
        ({"generate": 4, "sampled": 1, "top_p": 1.5}, "`top_p=1.5` is not above 0 and at most 1"),
    ],
)
def test_generation_that_cannot_be(asked, message, models, data):
    with pytest.raises(UserError, match=message):
        evaluate([models[1]], data, **asked)


def test_a_gate_on_loops_is_missed(models, data):
    with pytest.raises(GateError, match="distinct>=2 is missed"):
        evaluate([models[1]], data, generate=3, prompts=2, prompt_tokens=4, gate=["looping<=1", "distinct>=2"])


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [("kl<=1", 1, True), ("kl<1", 1, False), ("kl >= 1", 1, True), ("kl>1", 1, False), ("bytes<=2kB", 2000, True)],
)
def test_gate_comparisons(text, value, holds):
    assert parse_gate(text, ["kl", "bytes"]).holds(value) is holds


@pytest.mark.parametrize(
    ("gate", "message", "hint"),
    [
        ("perplexty<=3", "unknown gate metric 'perplexty'", "did you mean 'perplexity'?"),
        ("perplexity.c<=3", "unknown gate metric 'perplexity.c'", "did you mean 'perplexity."),
        ("accuracy.quiz>=.5", "unknown gate metric", ""),
        ("kl<=.1", "needs a model to compare to", "reference=MODEL"),
        ("top1>=.1", "needs a model to compare to", "reference=MODEL"),
        ("kl_p99<=.1", "needs a model to compare to", "reference=MODEL"),
        ("perplexity", "is not METRIC<=VALUE", "kl<=0.05"),
        ("perplexity=3", "is not METRIC<=VALUE", "kl<=0.05"),
        ("perplexity<=low", "'low' is not a number", "kl<=0.05"),
        ("perplexity<=nan", "'nan' is not a number", "kl<=0.05"),
        ("bytes<=many", "'many' is not a memory size", "8GiB"),
    ],
)
def test_bad_gates_are_refused_before_any_model_is_opened(data, gate, message, hint):
    with pytest.raises(UserError) as caught:
        evaluate([Path("/no/such/model")], data, gate=[gate])
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_inputs_are_checked_before_any_pass(models, data, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("moetools.verbs.evaluate.verb.Evaluator.measure", lambda *_: pytest.fail("a model was run"))
    with pytest.raises(CheckpointError, match="no model folder"):
        evaluate([models[0], tmp_path / "missing"], data)
    with pytest.raises(DataError, match="no such data"):
        evaluate([models[0]], DataOptions(data=[str(tmp_path / "missing.txt")]))
    with pytest.raises(UserError, match="nothing to measure"):
        evaluate([models[0]], None)
    with pytest.raises(UserError, match="no model was named"):
        evaluate([], data)
    with pytest.raises(UserError, match="two data sets are named 'quiz'"):
        evaluate([models[0]], None, choices=[inputs["quiz.jsonl"]] * 2)
    with pytest.raises(UserError, match="136 tokens"):
        evaluate([models[0], make_model(tmp_path / "larger", vocab_size=136)], data)
    with pytest.raises(UserError, match="different vocabularies"):
        evaluate([make_model(tmp_path / "renamed", words=WORDS[::-1])], data, reference=models[0])


def test_a_page_of_the_result(models, data, tmp_path):
    page = tmp_path / "result.html"
    found = evaluate(models, data, reference=models[0], html=page)
    written = page.read_text()
    for table in found.tables():
        assert all(f"<td>{in_html(cell)}</td>" in written for row in table.rows for cell in row)
    with pytest.raises(UserError, match=r"does not end in \.html"):
        evaluate([tmp_path / "none"], data, html=tmp_path / "result")
