"""Chats that ask for JSON or for tool calls, and whether an answer is what was asked for.

A record asks for JSON with `response_format` beside its messages, as OpenAI's API has it: {"type": "json_schema",
"json_schema": {"schema": {...}}}; and for calls with `tools`, where the chat's assistant calls one.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from moetools.errors import DataError
from moetools.text.chat import prompt_text
from moetools.text.foreign import cause, optional_module
from moetools.text.records import Document
from moetools.text.sources import DataSource, iter_documents

_PACKAGE = {"install": "moetools[schemas]", "what": "`structured`"}
_THOUGHT = "</think>"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked before the assistant's turn.

    Attributes:
        ids: the prompt's tokens.
        schema: of the answer's JSON; None where tools are to be called.
        tools: schema of the arguments of every tool, by its name.
    """

    ids: list[int]
    schema: Mapping[str, Any] | None
    tools: Mapping[str, Mapping[str, Any]]

    def answered_by(self, text: str) -> bool:
        """Whether all of `text` is JSON that the schema takes, or it calls tools and only as they take it."""
        text = text.rpartition(_THOUGHT)[2]
        if self.schema is None:
            calls = list(calls_in(text, list(self.tools)))
            return bool(calls) and all(name in self.tools and _takes(self.tools[name], value) for name, value in calls)
        try:
            return _takes(self.schema, json.loads(text))
        except (ValueError, RecursionError):
            return False


def questions(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, count: int, column: str | None = None
) -> list[Question]:
    """The first `count` of a source; none where its chats ask for neither.

    Raises:
        UserError: jsonschema is not installed.
        DataError: a source that cannot be read, a template that refuses a chat, a schema that is none.
    """
    found: list[Question] = []
    if source.is_tokens:
        return found
    for document in iter_documents(source, column=column):
        question = _question(document, tokenizer)
        if question is not None:
            found.append(question)
        if len(found) == count:
            break
    return found


def _question(document: Document, tokenizer: PreTrainedTokenizerBase) -> Question | None:
    answers = [place for place, one in enumerate(document.messages or ()) if one["role"] == "assistant"]
    calls = [place for place in answers if (document.messages or [])[place].get("tool_calls")]
    tools = {} if document.schema is not None else _parameters(document)
    if document.schema is None and not (tools and calls):
        return None
    end = calls[0] if tools else answers[-1] if answers else len(document.messages or ())
    text = prompt_text(document, end, tokenizer)
    for schema in [document.schema] if document.schema is not None else tools.values():
        _check(schema, document.where)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return Question(ids=ids, schema=document.schema, tools=tools)


def _parameters(document: Document) -> dict[str, Mapping[str, Any]]:
    functions = [tool.get("function", tool) for tool in document.tools or ()]
    named = [one for one in functions if isinstance(one, dict) and isinstance(one.get("name"), str)]
    return {one["name"]: one.get("parameters") or {} for one in named}


def calls_in(text: str, names: list[str]) -> Iterator[tuple[str, Any]]:
    """(tool, arguments) of every call in `text`, however the model's template marks them.

    A call is a JSON object with `name` and `arguments` (or `parameters`), or one with the arguments alone behind a
    tool's name that is not quoted. Arguments may be a string that holds JSON.
    """
    decoder, place, seen = json.JSONDecoder(), text.find("{"), 0
    known = re.compile(
        "|".join(rf'(?<![\w"]){re.escape(name)}(?![\w"])' for name in sorted(names, key=len, reverse=True))
    )
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            place = text.find("{", place + 1)
            continue
        inner = value.get("function")
        call = inner if isinstance(inner, dict) else value
        before = known.findall(text[seen:place]) if names else []
        given = next((call[key] for key in ("arguments", "parameters") if key in call), None)
        if isinstance(call.get("name"), str) and given is not None:
            yield call["name"], _parsed(given)
        elif before:
            yield before[-1], value
        seen, place = end, text.find("{", end)


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _check(schema: Any, where: str) -> None:
    """Refuse what is no JSON schema, or points at one that is not in it: nothing is downloaded."""
    jsonschema = optional_module("jsonschema", **_PACKAGE)
    try:
        jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator).check_schema(schema)
        _takes(schema, {})
    except Exception as error:
        raise DataError(
            f"{where}: not a JSON schema ({cause(error)})", hint="correct it, or drop the record"
        ) from error


def _takes(schema: Mapping[str, Any], value: Any) -> bool:
    jsonschema = optional_module("jsonschema", **_PACKAGE)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    registry = optional_module("referencing", **_PACKAGE).Registry()
    return bool(kind(schema, registry=registry).is_valid(value))
