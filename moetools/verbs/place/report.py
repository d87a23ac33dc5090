"""What `place-experts` did."""

from dataclasses import dataclass
from typing import Any

from moetools.pipeline.table import Table
from moetools.printable import in_code, in_markdown, printable
from moetools.verbs.place.plan import Placement
from moetools.verbs.reduce.report import ReduceReport


@dataclass(frozen=True, kw_only=True)
class PlaceReport(ReduceReport):
    """The record of one run.

    Attributes:
        placement: the order of the experts and what it is worth; None in a dry run.
    """

    placement: Placement | None

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return super().to_json() | {"placement": None if self.placement is None else self.placement.to_json()}

    def tables(self) -> list[Table]:
        """Sizes, and one row per layer."""
        parts = [self._parts()] if self.precision else []
        return [self._sizes(), *parts] + ([] if self.placement is None else [self.placement.table()])

    def card(self) -> str:
        """README.md of the output: what was done, what it is worth, and how to make it again."""
        assert self.placement is not None
        table = self.placement.table()
        lines = ["| " + " | ".join(row) + " |" for row in (table.columns, ["---"] * len(table.columns), *table.rows)]
        rows = "\n".join(lines)
        precision = f"\nThe weights are {self.precision}.\n" if self.precision else ""
        return f"""---
library_name: transformers
tags: [moe, {self.verb}, moetools]
---

# {in_markdown(self.out.rstrip("/").rpartition("/")[2])}

{in_code(self.input_path)} ({in_markdown(self.model_type)}) with its experts and the rows of its routers in another
order, by moetools {self.versions["moetools"]}. It computes the same; {self.placement.devices} devices that hold
consecutive experts are loaded more evenly.

{rows}

{table.note}.
{precision}
```
{printable(self.command)}
```

The order of every layer, the input's fingerprint and all versions are in `moetools.json`.
"""
