"""Random damage to JSON documents, byte strings and safetensors files, everything drawn from a given generator."""

import copy
import json
import random
from pathlib import Path
from typing import Any

HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, "8", "", "\ud800", "\x1b[31mred\x07", "x" * 400, -1, 0, 1, 3, 1.5, -0.5, 0.0, 2**31, 2**63,
    10**9, 10**30, float("inf"), float("-inf"), float("nan"), [], [[]], {}, {"a": 1}, [None], ["8"], [1, 2, 3],
    [10**9, 0, 1],
)  # fmt: skip
"""What a hostile or careless writer puts where something else is expected."""


def hostile_value(rng: random.Random) -> Any:
    """One of `HOSTILE_VALUES`, the caller's own to change."""
    return copy.deepcopy(rng.choice(HOSTILE_VALUES))


def mutated_document(rng: random.Random, document: Any, keys: tuple[str, ...] = ()) -> Any:
    """A deep copy of a JSON document with one to three things changed; `keys` are names that may be added."""
    changed = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        changed = _changed(rng, changed, keys)
    return changed


def mutated_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Bits flipped, bytes cut off, taken out, doubled, zeroed or made up."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(data) + 1)
        length = rng.choice((1, 2, 8, 64, 1024))
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[min(place, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length]
        elif kind == 4:
            data[place : place + length] = bytes(len(data[place : place + length]))
        else:
            data[place : place + length] = rng.randbytes(len(data[place : place + length]))
    return bytes(data)


def mutated_json_text(rng: random.Random, document: Any, keys: tuple[str, ...] = ()) -> bytes:
    """A changed document as text, now and then damaged as text too."""
    text = json.dumps(mutated_document(rng, document, keys)).encode()
    kind = rng.randrange(20)
    if kind == 0:
        return mutated_bytes(rng, text)
    if kind == 1:
        return rng.choice((b"", b"null", b"[]", b"1", b"[" * 100_000, b'{"a":' * 5_000, b"\xff\xfe{}", b"9" * 6_000))
    return text


def split_safetensors(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file with any header, legal or not."""
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def mutated_safetensors(rng: random.Random, file: Path) -> bytes:
    """Header or bytes of a safetensors file changed; the data is kept where only the header is."""
    kind = rng.randrange(8)
    if kind == 0:
        return mutated_bytes(rng, file.read_bytes())
    header, data = split_safetensors(file)
    if kind == 1:
        return join_safetensors(header, data, rng.choice((0, 1, 2**31, 2**63 - 1, 100_000_001, 7)))
    if kind == 2:
        return join_safetensors(header, mutated_bytes(rng, data))
    return join_safetensors(mutated_document(rng, header), data)


def _changed(rng: random.Random, document: Any, keys: tuple[str, ...]) -> Any:
    """`document` with one value replaced, removed, renamed or added; it is changed in place where it can be."""
    path = _random_path(rng, document)
    if keys and isinstance(document, dict) and rng.random() < 0.4:
        document[rng.choice(keys)] = hostile_value(rng)
        return document
    if not path:
        return hostile_value(rng)
    owner = document
    for step in path[:-1]:
        owner = owner[step]
    last = path[-1]
    kind = rng.randrange(10)
    if kind == 0:
        del owner[last]
    elif kind == 1 and isinstance(owner, dict):
        owner[rng.choice(("", "\ud800", f"{last}x", "a/b/c", "../x", "-1", "con"))] = owner.pop(last)
    elif kind == 2 and type(owner[last]) in (int, float):
        owner[last] = owner[last] * rng.choice((-1, 2, 1000, 10**9)) + rng.choice((0, 1, -1))
    elif kind == 3 and isinstance(owner, list):
        owner.insert(rng.randrange(len(owner) + 1), copy.deepcopy(owner[last]))
    else:
        owner[last] = hostile_value(rng)
    return document


def _random_path(rng: random.Random, document: Any) -> list[Any]:
    """Steps to a random value inside; empty only for a document without any."""
    path: list[Any] = []
    while isinstance(document, dict | list) and document:
        step = rng.choice(list(document)) if isinstance(document, dict) else rng.randrange(len(document))
        path.append(step)
        document = document[step]
        if rng.random() < 0.35:
            break
    return path
