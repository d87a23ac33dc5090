"""What counts as an answer that was asked for: JSON of a schema, calls of tools as several templates write them."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from moetools.errors import DataError
from moetools.text.sources import parse_data_option
from moetools.text.structured import Question, questions

pytest.importorskip("jsonschema")

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
USER, CALLS = {"role": "user", "content": "how is it"}, {"role": "assistant", "tool_calls": [CALL]}
AFTER = [{"role": "tool", "content": "fine"}, {"role": "assistant", "content": "fine"}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}


def tokenizer():
    found = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "moetools/demo/model")
    found.chat_template = TEMPLATE
    return found


def asked(tmp_path: Path, *records: dict, count: int = 9) -> list[Question]:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return questions(parse_data_option([str(file)])[0], tokenizer(), count)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"city": "Rome"}', True),
        (' {"city": "Rome", "more": 1}\n', True),
        ('<think>{"a"}</think>{"city": "Rome"}', True),
        ('{"city": 3}', False),
        ('{"town": "Rome"}', False),
        ('The city: {"city": "Rome"}', False),
        ('{"city": "Ro', False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_json(text, valid):
    assert Question(ids=[1], schema=CITY, tools={}).answered_by(text) is valid


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', True),
        ('[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]', True),
        ('[TOOL_CALLS]weather[ARGS]{"city": "Rome"}', True),
        ('{"name": "weather", "parameters": {"city": "Rome"}}', True),
        ('{"function": {"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}}', True),
        ('<function=weather>{"city": "Rome"}</function>', True),
        ('function<\uff5ctool\u2581sep\uff5c>weather\n```json\n{"city": "Rome"}\n```', True),
        ('commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}', True),
        ('{"name": "weather", "arguments": {"city": 3}}', False),
        ('{"name": "wether", "arguments": {"city": "Rome"}}', False),
        ('weather {"city": "Rome"} and weather {"town": "Rome"}', False),
        ('{"name": "weather", "arguments": {"city": "Rome"}', False),
        ('{"city": "Rome"}', False),
        ("it is fine", False),
    ],
)
def test_calls(text, valid):
    assert Question(ids=[1], schema=None, tools={"weather": CITY, "time": {}}).answered_by(text) is valid


def test_prompts_end_where_the_answer_begins(tmp_path):
    answer = {"role": "assistant", "content": '{"city": "Rome"}'}
    chats = [
        {"messages": [USER, answer]},
        {"messages": [USER, CALLS, *AFTER], "tools": [TOOL]},
        {"messages": [USER, answer], "tools": [TOOL]},
        {"messages": [USER, answer], "response_format": FORMAT},
        {"messages": [USER], "response_format": json.dumps(FORMAT)},
        {"messages": [USER, answer], "response_format": {"type": "json_object"}},
    ]
    found = asked(tmp_path, *chats)
    assert [question.schema for question in found] == [None, CITY, CITY]
    assert found[0].tools == {"weather": CITY}
    assert {tokenizer().decode(question.ids) for question in found} == {"<user>how is it<answer>"}
    assert len(asked(tmp_path, *chats, count=2)) == 2


@pytest.mark.parametrize("schema", [{"type": "no such type"}, {"$ref": "http://localhost:1/schema.json"}])
def test_a_schema_that_is_none_is_refused_with_its_line(schema, tmp_path):
    record = {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    with pytest.raises(DataError, match=r"chats\.jsonl:1: not a JSON schema"):
        asked(tmp_path, record)
