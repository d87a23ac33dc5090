"""What a task may be called: one rule for `--data NAME=PATH` and for the folders that are named after tasks."""

import re

LEGAL = re.compile(r"[A-Za-z0-9_.-]+")
LONGEST = 64
RULE = f"letters, digits, '_', '-' and '.', at most {LONGEST} of them"
_LONGEST_FOLDER = 200
_TAKEN = frozenset({"full", "report", "readme", "moetools", "task_routing", "task_routers", "task_classifier"})
"""Files and folders that an output has beside the tasks' folders, without their endings."""
_PORTS = (f"{port}{number}" for port in ("com", "lpt") for number in range(10))
_DEVICES = frozenset({"con", "prn", "aux", "nul", *_PORTS})
"""What Windows takes for a device, with any ending."""


def name_fault(name: str) -> str | None:
    """Why a task cannot be called so; None where it can."""
    if len(name) > LONGEST:
        return f"it has {len(name)} characters"
    return None if LEGAL.fullmatch(name) else "it has other characters"


def folder_fault(name: str) -> str | None:
    """Why a folder of an output cannot be called so, beside `name_fault` of the tasks it is for; None where it can."""
    stem = name.partition(".")[0].lower()
    if stem in _TAKEN or stem in _DEVICES:
        return "the name is taken"
    if not name[:1].isalnum() or name.endswith("."):
        return "it does not begin with a letter or digit, or ends with a dot"
    return f"it has {len(name)} characters" if len(name) > _LONGEST_FOLDER else None
