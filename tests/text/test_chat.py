"""Chats as users have them, rendered by templates that are copied from, or built like, those of published models."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from moetools.errors import DataError
from moetools.text.chat import passage
from moetools.text.records import document_of

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
# Qwen3-Coder: iterates over the arguments, so a string of JSON raises "Can only get item pairs from a mapping."
QWEN3_CODER = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
    "{% for call in m.tool_calls %}{% if call.function is defined %}{% set call = call.function %}{% endif %}"
    "<{{ call.name }}>{% for name, value in call.arguments|items %}<{{ name }}>{{ value }}{% endfor %}{% endfor %}"
    "{% endfor %}"
)
# DeepSeek-V3: adds the arguments to strings, so an object raises a TypeError.
DEEPSEEK_V3 = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' and m['tool_calls'] is defined %}"
    "{% for c in m['tool_calls'] %}{{ c['function']['name'] + '\\n' + c['function']['arguments'] }}{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
# Adds whatever a turn says to strings, and a turn that says nothing raises.
ADDING = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
TOOLS = "{% for tool in tools or [] %}({{ tool.function.name }}){% endfor %}" + PLAIN


def rendered(template: str | None, record: dict) -> str | DataError:
    backend = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = template
    found = passage(document_of(record, "file:1"), tokenizer)
    return found if isinstance(found, DataError) else found.text


def calling(arguments: object, **turn: object) -> dict:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call], **turn}]
    return {"messages": turns}


@pytest.mark.parametrize("arguments", [{"x": 1, "y": "b"}, '{"x": 1, "y": "b"}'])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_tool_calls_reach_templates_that_want_objects(arguments, content):
    assert rendered(QWEN3_CODER, calling(arguments, **content)) == "[user]q[assistant]<look><x>1<y>b"


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_tool_calls_reach_templates_that_want_strings(arguments, content):
    assert rendered(DEEPSEEK_V3, calling(arguments, **content)) == '[user]q[assistant]look\n{"x": 1}'


def test_tool_calls_without_a_function_around_them():
    record = {"messages": [{"role": "assistant", "tool_calls": [{"name": "look", "arguments": '{"x": 1}'}]}]}
    assert rendered(QWEN3_CODER, record) == "[assistant]<look><x>1"


@pytest.mark.parametrize("template", [PLAIN, ADDING])
@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_a_turn_that_says_nothing_is_not_written_as_none(template, content):
    assert rendered(template, calling({}, **content)) == "[user]q[assistant]"


def test_a_turn_that_only_thinks_has_no_content():
    record = {"messages": [{"role": "assistant", "content": None, "reasoning_content": "hm"}]}
    assert rendered(PLAIN + "{{ messages[0].reasoning_content }}", record) == "[assistant]hm"


def test_tools_reach_the_template_as_a_list_or_a_string_of_one():
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    chat = {"messages": [{"role": "user", "content": "q"}]}
    for value in (tools, json.dumps(tools)):
        assert rendered(TOOLS, chat | {"tools": value}) == "(look)[user]q"
    for value in (None, [], "", "[]"):
        assert rendered(TOOLS, chat | {"tools": value}) == "[user]q"


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        (STRICT, "TemplateError: System role not supported"),
        ("{% for name, value in messages[0].content|items %}{% endfor %}", "TypeError: Can only get item pairs"),
        ("{{ messages[7].content }}", "UndefinedError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% if %}", "TemplateSyntaxError: "),
        ("{{ messages|sort(attribute='a')|unknown }}", "TemplateAssertionError: "),
    ],
)
def test_whatever_a_template_raises_is_one_line_with_its_cause(template, cause):
    error = rendered(template, {"messages": [{"role": "system", "content": "a"}]})
    assert isinstance(error, DataError)
    assert error.message.startswith(f"file:1: the chat template refuses these messages: {cause}")
    assert "\n" not in error.message
    assert error.hint


def test_half_of_a_surrogate_pair_in_a_tool_call_is_found():
    error = rendered(QWEN3_CODER, calling({"x": "\ud83d"}))
    assert isinstance(error, DataError)
    assert "half of a surrogate pair" in error.message


def test_without_a_template_nothing_of_the_task_can_be_read():
    with pytest.raises(DataError, match="file:1: messages need a chat template"):
        rendered(None, {"messages": [{"role": "user", "content": "a"}]})


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "[user]q[assistant]a",
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "observation", "value": "o", "weight": None},
                ]
            },
            "[system]s[tool]o",
        ),
        ({"conversations": [{"role": "user", "content": "q"}]}, "[user]q"),
        ({"conversations": '[{"from": "human", "value": "q"}]'}, "[user]q"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]}, "[user]a\nb"),
        ({"messages": [{"role": "user", "content": []}]}, "[user]"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": None, "name": None}]}, "[user]a"),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            "[user]q[assistant]a",
        ),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": "a"}, "[user]q[assistant]a"),
        ({"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]}, "[user]q[assistant]a"),
    ],
)
def test_forms_of_chats(record, text):
    assert rendered(PLAIN, record) == text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "message 1: part 1 of 'content' is image_url, not text",
        ),
        ({"messages": [{"role": "user", "content": [3]}]}, "message 1: part 1 of 'content' is a number, not text"),
        ({"messages": [{"role": "assistant", "content": None}]}, "message 1: 'content' is null or missing"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "message 1: 'content' is null or missing"),
        ({"conversations": [{"from": "oracle", "value": "x"}]}, "message 1: 'from' is 'oracle'; legal: human, "),
        ({"conversations": [{"from": "gpt", "value": None}]}, "message 1: 'value' is null or missing"),
        ({"messages": "[broken"}, "'messages' is a string, not a list of messages"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": {"a": 1}}, "'tools' is an object, not a list"),
        (
            {"messages": [{"role": "user", "content": "a"}], "tools": ["a"]},
            "'tools' is an array, not a list of objects",
        ),
    ],
)
def test_chats_that_cannot_be_used(record, message):
    with pytest.raises(DataError) as caught:
        document_of(record, "file:1")
    assert message in caught.value.message
    assert caught.value.hint


BOTH = {
    "text": "plain",
    "messages": [{"role": "user", "content": "q"}],
    "body": "other",
    "prompt": "p",
    "completion": "c",
}


def test_a_record_in_several_forms_needs_a_column():
    with pytest.raises(DataError, match="has text and messages and prompt and completion; which of them") as caught:
        document_of(BOTH, "file:1")
    assert caught.value.hint == "choose with `column=text` or `column=messages` or `column=prompt`"


def test_a_column_names_text_or_messages_under_any_name():
    assert document_of(BOTH, "w", "text").text == "plain"
    assert document_of(BOTH, "w", "messages").messages == BOTH["messages"]
    assert document_of(BOTH, "w", "body").text == "other"
    assert document_of(BOTH, "w", "prompt").text == "pc"
    assert document_of(BOTH, "w", "completion").text == "c"
    assert document_of({"chosen": BOTH["messages"]}, "w", "chosen").messages == BOTH["messages"]
    assert document_of({"prompt": "p"}, "w", "prompt").text == "p"
    with pytest.raises(DataError, match="w: no 'answer'; the keys are text, messages"):
        document_of(BOTH, "w", "answer")
    with pytest.raises(DataError, match="w: 'body' is a number, not a string"):
        document_of({"body": 3}, "w", "body")
