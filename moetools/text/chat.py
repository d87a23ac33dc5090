"""Documents to text: chats through the tokenizer's template, which is foreign code with tastes of its own."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from moetools.errors import DataError
from moetools.text.foreign import foreign
from moetools.text.records import Document, Message, text_field


@dataclass(frozen=True, kw_only=True)
class Passage:
    """What is tokenized of one document; a chat's template may have begun it with the separator."""

    text: str
    is_chat: bool = False


def passage(document: Document, tokenizer: PreTrainedTokenizerBase) -> Passage | DataError:
    """The document's text, or why there is none.

    Raises:
        DataError: a chat, and the tokenizer has no template.
    """
    if document.text is not None:
        return Passage(text=document.text)
    if not tokenizer.chat_template:
        raise DataError(
            f"{document.where}: messages need a chat template, and the tokenizer has none",
            hint="use text records, or `tokenizer=PATH` with a tokenizer that has a chat template",
        )
    try:
        return Passage(text=_rendered(document, tokenizer), is_chat=True)
    except DataError as error:
        return error


def prompt_text(document: Document, end: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat before message `end`, and how the assistant's turn begins.

    Raises:
        DataError: the tokenizer has no template, or it refuses these messages.
    """
    if not tokenizer.chat_template:
        raise DataError(f"{document.where}: messages need a chat template, and the tokenizer has none")
    before = replace(document, messages=(document.messages or [])[:end])
    return _rendered(before, tokenizer, begins_answer=True)


def _rendered(document: Document, tokenizer: PreTrainedTokenizerBase, *, begins_answer: bool = False) -> str:
    """The chat in the first form that the template takes.

    Templates want the arguments of tool calls as objects (transformers' documentation; vLLM parses them too), older
    ones as strings; and a turn that says nothing without `content` (null would be written as "None"), or with "".
    """
    assert document.messages is not None
    refused: DataError | None = None
    tried: list[list[Message]] = []
    for messages in _forms(document.messages):
        if messages in tried:
            continue
        tried.append(messages)
        try:
            return _apply(messages, document, tokenizer, begins_answer)
        except DataError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _forms(messages: list[Message]) -> list[list[Message]]:
    forms = [[_with_arguments(message, change) for message in messages] for change in (_as_object, _as_string)]
    return forms + [[{"content": ""} | message for message in form] for form in forms]


def _apply(messages: list[Message], document: Document, tokenizer: PreTrainedTokenizerBase, begins_answer: bool) -> str:
    hint = "check the roles and their order; if the template is wrong, `tokenizer=PATH` names a folder with another"
    with foreign(f"{document.where}: the chat template refuses these messages", hint):
        text = tokenizer.apply_chat_template(
            messages, tools=document.tools, tokenize=False, add_generation_prompt=begins_answer
        )
    return text_field({"chat": text}, "chat", document.where)


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_changed(call, change) for call in calls]}


def _changed(call: Any, change: Callable[[Any], Any]) -> Any:
    """A call of either layout: {"function": {"arguments": ...}}, or the inner object itself."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _changed(call["function"], change)}
    return call | {"arguments": change(call["arguments"])} if "arguments" in call else call


def _as_object(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def _as_string(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
