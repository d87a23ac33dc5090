"""The tokenizer's files before foreign code reads them: sizes and numbers bounded."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetools.checkpoint.folder import read_json_object
from moetools.errors import CheckpointError

_MAX_BYTES = 1 << 29
"""Of one file; the largest vocabularies take a tenth."""
_MAX_ID, _MAX_COUNT, _MAX_GROWTH = 1 << 24, 1 << 16, 64
"""Of a token's id, of a number of tokens that a class makes up by itself, of the characters that one becomes."""
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_COUNTS = ("extra_ids", "num_extra_ids", "offset", "additional_special_tokens_count")


def check_tokenizer_files(path: Path) -> None:
    """Refuse files that would keep a tokenizer busy, or let it take memory, without bound.

    Raises:
        CheckpointError: a file that is too large or no JSON object, a token's id or a number of tokens that no model
            has, or a normalizer that makes text many times longer.
    """
    found = {name: _read(path / name) for name in _FILES if (path / name).is_file()}
    settings, tokenizer = found.get("tokenizer_config.json", {}), found.get("tokenizer.json", {})
    for key in _COUNTS:
        _check_number(path / "tokenizer_config.json", key, settings.get(key, 0), _MAX_COUNT)
    listed = settings.get("added_tokens_decoder") or {}
    for token in listed if isinstance(listed, Mapping) else ():
        number = int(token) if token.isascii() and token.isdigit() and len(token) < 20 else None
        _check_number(path / "tokenizer_config.json", "added_tokens_decoder", number, _MAX_ID)
    added = tokenizer.get("added_tokens") or []
    for token in added if isinstance(added, list) else [added]:
        number = token.get("id") if isinstance(token, dict) else None
        _check_number(path / "tokenizer.json", "id in added_tokens", number, _MAX_ID)
    growth = _growth(tokenizer.get("normalizer"))
    if growth > _MAX_GROWTH:
        message = f"{path / 'tokenizer.json'}: the normalizer makes {growth:.0f} characters of one"
        raise CheckpointError(message, hint="do not use this tokenizer: it is damaged or hostile")


def _read(file: Path) -> Mapping[str, Any]:
    if file.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes; a tokenizer's file has fewer")
    return read_json_object(file)


def _check_number(file: Path, key: str, value: object, most: int) -> None:
    if type(value) is not int or not 0 <= value <= most:
        message = f"{file}: {key} {str(value)[:40]!r}; legal is a whole number up to {most}"
        raise CheckpointError(message, hint="the tokenizer is damaged; download it again")


def _growth(normalizer: Any) -> float:
    """Characters that one may become; damaged parts are left to the library."""
    if not isinstance(normalizer, Mapping):
        return 1.0
    parts = normalizer.get("normalizers")
    if isinstance(parts, list):
        return math.prod(map(_growth, parts))
    content = normalizer.get("content")
    if not isinstance(content, str) or normalizer.get("type") != "Replace":
        return 1.0
    pattern = normalizer.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, Mapping) else None
    return max(1.0, len(content) / max(1, len(literal) if isinstance(literal, str) else 1))
