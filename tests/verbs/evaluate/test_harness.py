"""Tasks of lm-eval on our forward pass, against the harness' own model of transformers; paired tests by enumeration."""

import itertools
import json
import shutil
from math import comb
from pathlib import Path

import numpy
import pytest
import torch

import moetools
from moetools.errors import DataError, GateError, UserError
from moetools.formats.reader import open_model
from moetools.forward.evaluate import likelihoods
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.text.tokens import TokenBatch
from moetools.verbs.evaluate import harness
from moetools.verbs.evaluate.harness import HarnessScore, difference, mcnemar, task_name
from moetools.verbs.evaluate.options import EvaluateOptions

DEMO = Path(moetools.__file__).parent / "demo/model"
CPU = {"device": "cpu"}
TASKS = {
    "choice": """task: own_choice
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "text": """task: own_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}{{choices[0]}}"
metric_list: [{metric: bits_per_byte}]
""",
    "words": """task: own_words
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def test_likelihoods_are_those_of_a_plain_loop(tiny, stock) -> None:
    model = tiny("qwen2_moe", dtype=torch.float32)
    ids = torch.randint(2, 128, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True] * 9, [True] * 5 + [False] * 4, [True] * 7 + [False] * 2])
    wanted = mask & (torch.arange(9) >= torch.tensor([1, 3, 4])[:, None])
    streamed = StreamedModel(open_model(model), ForwardOptions(device="cpu"))
    batch = TokenBatch(input_ids=ids, attention_mask=mask, task=torch.zeros(3, dtype=torch.int64))
    ((log_prob, top),) = likelihoods(streamed, [(batch, wanted)])
    expected, most = [], []
    for row, place in wanted.nonzero().tolist():
        logits = stock(model)(ids[row : row + 1, :place]).logits[0, -1].detach()
        expected.append(logits.log_softmax(-1)[ids[row, place]].item())
        most.append(logits.argmax().item() == ids[row, place])
    assert log_prob.tolist() == pytest.approx(expected, abs=1e-5)
    assert top.tolist() == most


@pytest.mark.parametrize("pair", list(itertools.product(range(4), range(4))))
def test_mcnemar_counts_all_tosses(pair: tuple[int, int]) -> None:
    total = sum(pair)
    chances = [comb(total, heads) / 2**total for heads in range(total + 1)]
    expected = sum(one for one in chances if one <= chances[pair[0]] * (1 + 1e-9))
    assert mcnemar(*pair) == pytest.approx(expected)


def score(*questions: float) -> HarnessScore:
    return HarnessScore(
        task="t", metric="acc", value=float(numpy.mean(questions)), standard_error=None, questions=questions
    )


def test_differences_are_taken_question_by_question() -> None:
    better, worse = score(*[1.0] * 8, *[0.0] * 2), score(*[1.0] * 2, *[0.0] * 8)
    found = difference(worse, better)
    assert found.recovery == pytest.approx(0.25)
    assert found.p == pytest.approx(2 / 2**6)
    assert found.low < -0.6 < found.high < 0
    same = difference(better, better)
    assert (same.recovery, same.low, same.high, same.p) == (1.0, 0.0, 0.0, 1.0)
    graded = difference(score(0.5, 0.7, 0.9), score(0.4, 0.7, 1.0))
    assert graded.p is None
    assert graded.low <= 0 <= graded.high
    assert difference(score(0.0), score(0.0)).recovery is None
    assert difference(score(1.0), score(1.0, 1.0)).p is None


def test_names_of_files(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("task: own\nprocess_docs: !function utils.clean\n")
    assert task_name(str(file)) == "own"
    assert task_name("arc_easy") == "arc_easy"
    file.write_text("group: own\n")
    with pytest.raises(DataError, match="names no `task`"):
        task_name(str(file))
    with pytest.raises(UserError, match="no file"):
        task_name(str(tmp_path / "b.yaml"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 3}, "for the tasks of `harness`"),
        ({"fewshot": -1, "harness": ["own"]}, "fewshot=-1"),
        ({"harness": ["own"], "limit": 0}, "limit=0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        EvaluateOptions(**options).check(has_text=False)


def test_without_the_package_its_name_is_said(monkeypatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="lm-eval") as caught:
        moetools.evaluate(DEMO, harness="arc_easy", **CPU)
    assert "moetools[harness]" in caught.value.hint


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch) -> dict[str, str]:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["king", "house", "night", "river", "sea", "stone"]
    items = [
        {"prompt": f"The {one} was", "choices": [f" {two} and old.", f" zq{two}{two}."], "answer": 0}
        for one, two in itertools.permutations(words, 2)
    ][:12]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/q.jsonl\ntest_split: test\n"
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(text + source)
    return {name: str(tmp_path / f"{name}.yaml") for name in TASKS}


@pytest.mark.filterwarnings("ignore")
def test_the_harness_gets_what_its_own_model_gives_it(tasks: dict[str, str], tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = HFLM(pretrained=str(DEMO), dtype="float32", device="cpu", batch_size=4)
    names = [f"own_{name}" for name in TASKS]
    manager = TaskManager(include_path=str(tmp_path))
    expected = simple_evaluate(model=own, tasks=names, task_manager=manager, bootstrap_iters=0)
    model = shutil.copytree(DEMO, tmp_path / "copy")
    found = moetools.evaluate(model, reference=DEMO, harness=list(tasks.values()), dtype="float32", **CPU).to_json()
    first, second = ({one["task"]: one for one in each["harness"]} for each in found["models"])
    for task, values in expected["results"].items():
        value = next(value for key, value in values.items() if key.endswith(",none"))
        assert first[task]["value"] == pytest.approx(float(value), rel=1e-5)
        assert second[task]["value"] == first[task]["value"]
        assert first[task]["difference"] is None
        assert second[task]["difference"]["recovery"] in (None, 1.0)
    for one, mine in zip(expected["samples"]["own_choice"], second["own_choice"]["questions"], strict=True):
        assert one["acc"] == mine
    assert second["own_choice"]["difference"]["p"] == 1.0


@pytest.mark.filterwarnings("ignore")
def test_limits_gates_and_unknown_tasks(tasks: dict[str, str]) -> None:
    gate = f"harness.{tasks['choice']}>1"
    with pytest.raises(GateError, match="is missed with") as caught:
        moetools.evaluate(DEMO, harness=tasks["choice"], limit=5, fewshot=0, gate=[gate], **CPU)
    (model,) = caught.value.result.to_json()["models"]
    assert len(model["harness"][0]["questions"]) == 5
    assert any(table.title == "Evaluation harness" for table in caught.value.result.tables())
    with pytest.raises(UserError, match="knows no task 'own_nothing'"):
        moetools.evaluate(DEMO, harness="own_nothing", **CPU)
    Path(tasks["text"]).write_text(TASKS["text"] + "dataset_path: json\ndataset_kwargs: {data_files: /none}\n")
    with pytest.raises(DataError, match="harness tasks own_text cannot be run"):
        moetools.evaluate(DEMO, harness=tasks["text"], **CPU)
