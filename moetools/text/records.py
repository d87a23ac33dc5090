"""Records (JSON objects, rows of a table) to documents, in the forms that data sets come in.

A record holds exactly one of `text`, `messages`, `conversations` (ShareGPT), or `prompt` with `completion`; where it
holds several, or calls them otherwise, a column is named. Other keys are ignored, but for `tools` beside messages.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moetools.errors import DataError

Message = dict[str, Any]

PAIR = ("prompt", "completion")
_CHATS = ("messages", "conversations")
COLUMNS = ("text", *_CHATS, *PAIR)
_LEGAL = "'text' | 'messages' | 'conversations' | 'prompt' with 'completion'"
SHAPE_HINT = (
    'write {"text": "..."}, {"messages": [{"role": "user", "content": "..."}]} '
    'or {"prompt": "...", "completion": "..."}, or name the key that holds the text: `column=KEY`'
)
# An assistant's turn that calls a tool, or only thinks, says nothing.
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "thinking")
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "observation"), "tool"),
    "system": "system",
}


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document: either plain text or a chat, never both.

    Attributes:
        text: the text; a prompt and its completion are joined without anything between them.
        prompt: the text's beginning that was a prompt; None where none was.
        messages: a chat, each message with the strings `role` and `content`; the latter may lack (it is never null)
            where an assistant calls a tool.
        tools: descriptions of the functions that the chat's assistant may call.
        schema: JSON schema of what the assistant answers (`response_format`).
        where: "file:line" (a row number for parquet and hub datasets, the bare file for .txt).
    """

    text: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Any] | None = None
    schema: dict[str, Any] | None = None
    where: str


def document_of(record: Mapping[str, Any], where: str, column: str | None = None) -> Document:
    """The document a record holds; `column` names the key of its text or messages.

    Raises:
        DataError: none or several of the legal keys, or a value of the wrong type.
    """
    # Tables have every column in every row, so null means absent.
    present = [key for key, value in record.items() if value is not None]
    if column is not None and column not in present:
        raise DataError(
            f"{where}: no '{column}'; the keys are {', '.join(present) or '(none)'}", hint="`column` names one of them"
        )
    key = column or _only_form(record, present, where)
    if key == "prompt" and "completion" in present:
        return _pair(record, where)
    value = _parsed(record[key]) if key in _CHATS else record[key]
    if key in _CHATS or (column is not None and isinstance(value, list)):
        messages, tools = _messages(value, key, where), _tools(record, where)
        return Document(messages=messages, tools=tools, schema=_schema(record), where=where)
    return Document(text=text_field(record, key, where), where=where)


def text_field(record: Mapping[str, Any], key: str, where: str) -> str:
    """`record[key]`, which has to be there and be a string that UTF-8 can encode.

    Raises:
        DataError: missing, another type, or half of a surrogate pair in it.
    """
    value = record.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {json_type(value)}, not a string", hint=f"write '{key}' as one string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {key!r} has half of a surrogate pair at character {error.start}, which is not text",
                hint="replace escapes such as \\ud83d that lack their second half",
            ) from error
    return value


def illegal_record(where: str, received: str) -> DataError:
    """The error for a record, or a whole table, without exactly one form."""
    return DataError(f"{where}: {received}; legal is exactly one of {_LEGAL}", hint=SHAPE_HINT)


def json_type(value: object) -> str:
    """What JSON calls the type of a value, with its article."""
    names = {
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "an array",
        dict: "an object",
    }
    return "null or missing" if value is None else names.get(type(value), type(value).__name__)


def _only_form(record: Mapping[str, Any], present: list[str], where: str) -> str:
    forms = [key for key in ("text", *_CHATS) if key in present]
    forms += ["prompt"] if all(key in present for key in PAIR) else []
    if len(forms) > 1:
        found = [key for key in COLUMNS if key in forms or (key == "completion" and "prompt" in forms)]
        raise DataError(
            f"{where}: has {' and '.join(found)}; which of them is the text?",
            hint="choose with " + " or ".join(f"`column={form}`" for form in forms),
        )
    if not forms:
        nulls = [key for key in COLUMNS if key in record and key not in present]
        received = f"has null in {nulls[0]!r}" if nulls else f"has the keys {', '.join(record) or '(none)'}"
        raise illegal_record(where, received)
    return forms[0]


def _pair(record: Mapping[str, Any], where: str) -> Document:
    if not any(isinstance(record[key], list) for key in PAIR):
        prompt, completion = (text_field(record, key, where) for key in PAIR)
        return Document(text=prompt + completion, prompt=prompt, where=where)
    turns: list[Message] = []
    for key, role in zip(PAIR, ("user", "assistant"), strict=True):
        value = record[key]
        turns += _messages(value if isinstance(value, list) else [{"role": role, "content": value}], key, where)
    return Document(messages=turns, tools=_tools(record, where), where=where)


def _messages(value: object, key: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        received = "an empty list" if value == [] else json_type(value)
        raise DataError(f"{where}: {key!r} is {received}, not a list of messages", hint=SHAPE_HINT)
    return [_message(message, f"{where}: message {number}") for number, message in enumerate(value, start=1)]


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {json_type(message)}, not an object", hint=SHAPE_HINT)
    given = {key: value for key, value in message.items() if value is not None}
    if "from" in given and "role" not in given:
        given = _from_sharegpt(given, where)
    role = text_field(given, "role", where)
    if isinstance(given.get("content"), list):
        given["content"] = _joined(given["content"], where)
    elif "content" in given or role != "assistant" or not any(given.get(key) for key in _INSTEAD_OF_CONTENT):
        text_field(given, "content", where)
    return given


def _from_sharegpt(message: Message, where: str) -> Message:
    speaker = text_field(message, "from", where)
    if speaker not in _SHAREGPT_ROLES:
        raise DataError(
            f"{where}: 'from' is '{speaker}'; legal: {', '.join(_SHAREGPT_ROLES)}", hint="rename the speaker"
        )
    return {"role": _SHAREGPT_ROLES[speaker], "content": text_field(message, "value", where)}


def _joined(parts: list[Any], where: str) -> str:
    """Text parts as one string, a line each, as vLLM gives them to templates that take strings."""
    texts = []
    for number, part in enumerate(parts, start=1):
        kind = part.get("type", "text") if isinstance(part, dict) else json_type(part)
        if kind != "text" and not isinstance(part, str):
            raise DataError(
                f"{where}: part {number} of 'content' is {kind}, not text", hint="keep the text parts, or drop the line"
            )
        texts.append(text_field({"text": part} if isinstance(part, str) else part, "text", f"{where}: part {number}"))
    return "\n".join(texts)


def _tools(record: Mapping[str, Any], where: str) -> list[Any] | None:
    tools = _parsed(record.get("tools"))
    if tools is None or tools in ("", []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: 'tools' is {json_type(tools)}, not a list of objects", hint="write a list, or none")
    return tools


def _schema(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `response_format` asks for, as OpenAI's API has it; other forms ask for nothing that can be checked."""
    found = _parsed(record.get("response_format"))
    for key in ("json_schema", "schema"):
        found = _parsed(found.get(key)) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def _parsed(value: Any) -> Any:
    """What a string of JSON holds; many tables store nested values so."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
