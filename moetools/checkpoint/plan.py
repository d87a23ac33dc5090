"""The plan of a run: the settings that determine every byte, compared when a run goes on."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

_ABSENT = "(absent)"


def canonical(plan: Mapping[str, Any]) -> Any:
    """The plan as it comes back from JSON."""
    return json.loads(json.dumps(plan, sort_keys=True))


def plan_digest(plan: Mapping[str, Any]) -> str:
    """The same for plans that are equal as JSON."""
    return hashlib.sha256(json.dumps(canonical(plan), sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """The settings that differ, as "method.keep: 4 -> 2"."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(old.get(name, _ABSENT), new.get(name, _ABSENT), f"{key}.{name}" if key else name)
    elif old != new:
        yield f"{key}: {short(old)} -> {short(new)}"


def short(value: Any) -> str:
    """For a message."""
    text = value if value is _ABSENT else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
