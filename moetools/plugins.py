"""Look plug-ins up by file name: the file `hc_smoe.py` in a plug-in package is the plug-in `hc-smoe`.

A plug-in package holds one file per plug-in, plus `base.py` (the contract) and files that start with `_`. Nothing is
imported to list the names, so listing is free of torch and the command line can offer them as choices.
"""

import difflib
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from moetools.errors import UserError


def plugin_names(package: str) -> list[str]:
    """Names of all plug-ins of `package` (dotted path), sorted, with `-` for `_`."""
    root = Path(__file__).parent.joinpath(*package.split(".")[1:])
    found = (module.name for module in pkgutil.iter_modules([str(root)]) if not module.ispkg)
    return sorted(name.replace("_", "-") for name in found if name != "base" and not name.startswith("_"))


def load_plugin(package: str, name: str, *, kind: str) -> ModuleType:
    """Import plug-in `name` of `package`.

    Raises:
        UserError: no such plug-in; the hint names the closest one. `kind` ("method", "format", ...) words the message.
    """
    names = plugin_names(package)
    wanted = name.replace("_", "-")
    if wanted not in names:
        raise unknown_name(kind, name, names)
    return importlib.import_module(f"{package}.{wanted.replace('-', '_')}")


def unknown_name(kind: str, name: str, legal: list[str]) -> UserError:
    """The error for a name that is not one of `legal`, with a did-you-mean hint."""
    close = difflib.get_close_matches(name.lower(), legal, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else ""
    return UserError(f"unknown {kind} '{name}'; legal: {', '.join(legal)}", hint=hint)
