"""`evaluate --structured`: a model's answers to chats are judged, and gated."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from moetools.errors import DataError, GateError, UserError
from moetools.forward.options import ForwardOptions
from moetools.text.options import DataOptions
from moetools.verbs.evaluate import structured
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate

pytest.importorskip("jsonschema")

MODEL = Path(__file__).parents[3] / "moetools/demo/model"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> DataOptions:
    folder = tmp_path_factory.mktemp("chats")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    answer = {"role": "assistant", "content": '{"city": "Rome"}'}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}]}
    records = [
        *({"messages": [{"role": "user", "content": f"{words} please"}, answer],
           "response_format": {"json_schema": {"schema": CITY}}} for words in ("one two", "a")),
        {"messages": [{"role": "user", "content": "weather?"}, call], "tools": [TOOL]},
    ]  # fmt: skip
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataOptions(data=[str(folder / "chats.jsonl")], seq_len=8, samples=2, tokenizer=folder / "tokenizer")


def run(text: DataOptions, **asked: object):
    options = EvaluateOptions(**{"generate": 16, "prompts": 1, "prompt_tokens": 4, "structured": 8} | asked)
    return evaluate([MODEL], options, text, ForwardOptions(device="cpu", dtype="float32"))


def test_a_model_that_knows_no_json_misses_the_gate(text):
    with pytest.raises(GateError, match=r"valid_json>=0\.5 is missed with 0") as caught:
        run(text, gate=["valid_json>=0.5", "valid_calls>=0"])
    found = caught.value.result.models[0].structured
    assert (found.valid_json, found.valid_calls, found.json_prompts, found.call_prompts) == (0, 0, 2, 1)
    table = next(table for table in caught.value.result.tables() if table.title == "Valid answers (chats)")
    assert table.columns[1:] == ["JSON % (2)", "Tool calls % (1)"]


def test_answers_are_judged_each_by_its_own_question(text, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(text.tokenizer)

    def answers(model, batches, tokens, plan, *, end_ids):
        rows = [row for batch in batches for row in batch.input_ids]
        said = [
            '{"name": "weather", "arguments": {"city": "Rome"}}' if "weather" in tokenizer.decode(row)
            else '{"city": "Rome"}' if "one" in tokenizer.decode(row) else '{"city": "Rome"'
            for row in rows
        ]  # fmt: skip
        ids = [[*tokenizer.encode(one, add_special_tokens=False), min(end_ids)] for one in said]
        ids = iter([one + [min(end_ids)] * (64 - len(one)) for one in ids])
        return [torch.tensor([next(ids) for _ in batch.input_ids]) for batch in batches]

    monkeypatch.setattr(structured, "continuations", answers)
    found = run(text).models[0].structured
    assert (found.valid_json, found.valid_calls) == (0.5, 1)


def test_what_cannot_be_asked(text, tmp_path):
    with pytest.raises(UserError, match="no length is given"):
        run(text, generate=None)
    (tmp_path / "plain.txt").write_text("some words in a row " * 20)
    plain = DataOptions(data=[str(tmp_path / "plain.txt")], seq_len=8, samples=2, tokenizer=text.tokenizer)
    with pytest.raises(DataError, match="no chat in the data asks"):
        run(plain)
    chat = {"messages": [{"role": "user", "content": "one two three"}], "response_format": {"schema": CITY}}
    (tmp_path / "json.jsonl").write_text(json.dumps(chat | {"response_format": {"json_schema": {"schema": CITY}}}))
    data = DataOptions(data=[str(tmp_path / "json.jsonl")], seq_len=4, samples=1, tokenizer=text.tokenizer)
    with pytest.raises(UserError, match="gate 'valid_calls>=0': no chat in the data asks for it"):
        run(data, gate=["valid_calls>=0"], prompt_tokens=2)
