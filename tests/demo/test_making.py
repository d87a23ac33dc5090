"""How the demo was made: the arithmetic, the text, the batches and the experts function of its training."""

import itertools
import json
import random
import re

import pytest
import torch
from transformers import Qwen2MoeForCausalLM

from moetools.demo import demo_data_path
from tests.demo.making import arithmetic, choice, prepare, train

LINE = re.compile(r"(-?\d+) ([-+x]) (-?\d+) = (-?\d+)\.")


def line_holds(left, op, right, result):
    return {"+": int(left) + int(right), "-": int(left) - int(right), "x": int(left) * int(right)}[op] == int(result)


def problems(count):
    return list(itertools.islice(arithmetic.problems(seed=5), count))


def test_every_line_of_a_solution_holds_and_the_last_is_the_answer():
    for problem in problems(500):
        lines = LINE.findall(problem.solution())
        assert len(lines) == len(problem.steps)
        assert all(line_holds(*line) for line in lines)
        assert re.search(r"The answer is (-?\d+)", problem.solution()).group(1) == lines[-1][3]
        assert int(lines[-1][3]) >= 0


@pytest.mark.parametrize("start", ["What is", "Work out", "How much is", "Find the value of"])
def test_plain_questions_are_answered(start):
    asked = [p for p in problems(800) if re.match(start + r" \d", p.question)]
    assert len(asked) > 10
    for problem in asked:
        question = re.search(r"(\d+) ([-+x]) (\d+)", problem.question)
        answer = re.search(r"The answer is (-?\d+)", problem.solution())
        assert line_holds(*question.groups(), answer.group(1))


def test_a_wrong_solution_has_one_wrong_line_and_another_answer():
    rng = random.Random(0)
    for problem in problems(100):
        wrong = arithmetic.wrong_solutions(problem, 4, rng)
        assert len({*wrong, problem.solution()}) == 5
        for text in wrong:
            assert sum(not line_holds(*line) for line in LINE.findall(text)) == 1
            assert text.split("answer is")[1] != problem.solution().split("answer is")[1]


def test_no_problem_comes_twice_and_the_seed_decides():
    texts = [p.text for p in problems(2000)]
    assert len(set(texts)) == 2000
    assert texts == [p.text for p in problems(2000)]


def test_the_embedded_arithmetic_comes_from_the_generator():
    embedded = (demo_data_path() / "arithmetic/test.jsonl").read_text().splitlines()
    generated = {text for _, text in prepare.read_arithmetic(prepare.TRAIN_PROBLEMS)}
    assert {json.loads(line)["text"] for line in embedded} <= generated


def test_the_manual_text_is_paragraphs_without_navigation_and_code():
    page = """<html><head><title>no</title><style>no</style></head><body>
      <div id="page-header"><p class="menu">no</p></div>
      <div class="toplang"><p>no</p></div><h1>Titre</h1><p>Un &eacute;t&eacute;
      <code>Listen</code><br>chaud.</p><pre>no</pre><div class="example"><p><code>no</code></p></div>
      <ul><li><img src="x">point</li></ul><div id="footer"><p>no</p></div></body></html>"""
    parser = prepare.ManualText()
    parser.feed(page)
    assert parser.blocks == ["Titre", "Un été Listen chaud.", "point"]


def test_split_keeps_documents_apart():
    documents = [(f"d{i}", f"{i} " + "x" * 5000 + f"\n{i} " + "y" * 5000) for i in range(60)]
    parts = prepare.split(documents)
    names = {part: {name for name, _ in pieces} for part, pieces in parts.items()}
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == 60
    assert all(len(text) <= prepare.SHIPPED_CHARS for part in ("test", "calibration") for _, text in parts[part])
    assert "".join(text for _, text in parts["train"]).count("y") == 5000 * len(names["train"])


def test_cut_loses_nothing():
    text = "".join(f"line {i}\n" for i in range(1000)) + "z" * 3000
    pieces = prepare.cut(text, 700)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 700


@pytest.mark.parametrize(("task", "width"), [("prose", 120), ("code", 60), ("french", 120)])
def test_continuations_come_from_the_text(task, width):
    rng = random.Random(1)
    words = ("alpha", "beta,", "gamma;", "delta")
    lines = [" ".join(rng.choice(words) for _ in range(30))[:width].rstrip() for _ in range(300)]
    text = "\n".join(lines)
    made = choice.items(task, [text], set(), count=20)
    assert len(made) == 20
    assert all(item["prompt"] + item["choices"][item["answer"]] in text for item in made)


def test_one_pass_of_windows_sees_every_window_once():
    stream = torch.arange(1000)
    first_pass = train.pick_windows(stream, 0, 98, 10, seed=3)
    assert len(first_pass.unique()) == 980
    assert (first_pass == first_pass[:, :1] + torch.arange(10)).all()
    second_pass = train.pick_windows(stream, 98, 98, 10, seed=3)
    assert first_pass.tolist() != second_pass.tolist()
    assert (
        train.pick_windows(stream, 90, 20, 10, seed=3).tolist() == first_pass[90:].tolist() + second_pass[:12].tolist()
    )


def test_learning_rate_rises_stays_and_falls_to_zero():
    config = train.TrainConfig(steps=1000, warmup=100, decay=0.4, learning_rate=1.0)
    rates = [train.learning_rate(step, config) for step in (0, 99, 100, 600, 800, 999)]
    assert rates == pytest.approx([0.01, 1.0, 1.0, 1.0, 0.5, 0.0025])


def test_router_losses_are_least_for_balanced_routing():
    even = torch.zeros(8, 4), torch.arange(8).view(8, 1) % 4
    balance, z = train.router_losses([even])
    assert balance.item() == pytest.approx(1.0)
    assert z.item() == pytest.approx(torch.tensor(4.0).log().item() ** 2)
    one = torch.tensor([[9.0, 0, 0, 0]] * 8), torch.zeros(8, 1, dtype=torch.long)
    assert train.router_losses([one])[0] > 3.9


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    config = train.TrainConfig(steps=4, warmup=1, window=16, mix=(("a", 1), ("b", 1)), log_every=2, save_every=2)
    streams = {name: torch.randint(64, (600,), generator=torch.Generator().manual_seed(7)) for name in "ab"}
    small = train.model_config(64)
    small.num_hidden_layers = 1

    def fresh():
        torch.manual_seed(2)
        return Qwen2MoeForCausalLM(small)

    whole, broken, resumed = fresh(), fresh(), fresh()
    log = train.train(whole, streams, streams, config, tmp_path / "whole.pt")
    assert [row["step"] for row in log["curve"]] == [2, 4]
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_batch", interrupted_at(3, train.make_batch))
        with pytest.raises(KeyboardInterrupt):
            train.train(broken, streams, streams, config, tmp_path / "broken.pt")
    train.train(resumed, streams, streams, config, tmp_path / "broken.pt")
    for ours, reference in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, reference)


def interrupted_at(stop, make_batch):
    def interrupting(streams, step, config):
        if step == stop:
            raise KeyboardInterrupt
        return make_batch(streams, step, config)

    return interrupting
