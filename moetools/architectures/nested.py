"""The text model's part of a config.json, wherever it is nested."""

from collections.abc import Mapping
from typing import Any


def text_part(config: Mapping[str, Any], at: tuple[str, ...]) -> Mapping[str, Any]:
    """The part of `config` that the keys `at` lead to."""
    for key in at:
        config = config.get(key) or {}
    return config


def with_text_part(config: Mapping[str, Any], at: tuple[str, ...], inner: dict[str, Any]) -> dict[str, Any]:
    """`config` with the part that `at` leads to replaced."""
    if not at:
        return inner
    return {**config, at[0]: with_text_part(config.get(at[0]) or {}, at[1:], inner)}
