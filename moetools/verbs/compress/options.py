"""What is asked of `compress`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moetools.arguments import DATA, OUTPUT, option
from moetools.errors import UserError
from moetools.plugins import unknown_name
from moetools.sizes import parse_bytes
from moetools.text.sources import parse_data_option
from moetools.verbs.plots_option import plots_option

TARGETS = ("transformers", "vllm", "packed")


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """What is asked of `compress`."""

    target_size: str | None = option(
        None,
        "Bytes that the weight files may take, such as 24GB, or a share of the original, such as 40%.",
        metavar="SIZE",
    )
    context: int | None = option(
        None,
        "Tokens per sequence whose keys and values (16 bits) must fit beside the weights: they are taken off "
        "`target_size`.",
        metavar="N",
    )
    batch: int = option(1, "Sequences at once, for `context`.", metavar="B")
    target: str = option(
        "transformers",
        "What must load the result: transformers, vllm, or packed (transformers with moetools.hf imported; any mix).",
        metavar="LOADER",
        choices=lambda: TARGETS,
    )
    min_experts: int = option(1, "Experts that every layer keeps at least.", metavar="N")
    checks: int = option(
        3,
        "Plans that are built on all of the text and measured on held-out text before the best of them is taken.",
        metavar="N",
    )
    heal_minutes: float | None = option(
        None,
        "Then train the best plan for so long towards the original's predictions, and take what loses less; both "
        "models must fit in memory.",
        metavar="M",
    )
    html: Path | None = option(
        None,
        "Also write the plans as one self-contained page, size against loss; a file that is there is replaced.",
        metavar="FILE.html",
        panel=OUTPUT,
        path="writes",
    )
    plots: Path | None = plots_option()
    plan_only: bool = option(
        False, "Predict, show the frontier and write the plan to `out`-plan.yaml, a recipe for run; build nothing."
    )
    test: list[str] = option(
        [],
        "Held-out text that plans are judged on; if not given, the last fifth of each task's text is held out.",
        metavar="NAME=PATH",
        panel=DATA,
    )
    keep_tasks: list[str] = option(
        [],
        "A task of `data` whose loss counts: plans are calibrated, chosen and healed on such text alone. Repeat it; "
        "all tasks count if none is given.",
        metavar="NAME",
        panel=DATA,
    )
    probe_tokens: int | None = option(
        None,
        "Tokens of calibration text, and of held-out text, that choices are tried out on. [default: as many as take "
        "three passes over the calibration text, at most 16,384]",
        metavar="N",
        panel=DATA,
    )

    def check(self) -> None:
        """Refuse values that cannot be used.

        Raises:
            UserError: naming the option.
        """
        if self.target_size is None:
            raise UserError("how large may the result be?", hint="`target_size=24GB`, or `target_size=40%`")
        if self.target not in TARGETS:
            raise unknown_name("target", self.target, list(TARGETS))
        if self.context is None and self.batch != 1:
            raise UserError(f"`batch={self.batch}` is for `context`", hint="tokens per sequence: `context=4096`")
        for name in ("min_experts", "checks", "probe_tokens", "context", "batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"`{name}={getattr(self, name)}` is below 1")
        if self.heal_minutes is not None and not 0 < self.heal_minutes < math.inf:
            raise UserError(f"`heal_minutes={self.heal_minutes:g}` is not above 0")

    def kept(self, named: Sequence[str], option_name: str) -> list[str]:
        """Of the values of `data` or `test`, those whose tasks count.

        Args:
            option_name: of the values, for messages.

        Raises:
            UserError: a task of `keep_tasks` that has no text.
        """
        tasks = [source.task for source in parse_data_option(named, option_name)]
        for task in self.keep_tasks:
            if task not in tasks:
                raise unknown_name(f"task of `{option_name}`", task, tasks)
        if not self.keep_tasks:
            return list(named)
        return [value for value, task in zip(named, tasks, strict=True) if task in self.keep_tasks]

    def size(self, original: int) -> int:
        """The budget in bytes.

        Args:
            original: bytes of the original's weight files.

        Raises:
            UserError: no number of bytes, or a share that is not between 0 and 100 %.
        """
        assert self.target_size is not None
        if not self.target_size.strip().endswith("%"):
            return parse_bytes(self.target_size)
        try:
            share = float(self.target_size.strip()[:-1])
        except ValueError:
            share = -1.0
        if not 0 < share <= 100:
            raise UserError(f"`target_size={self.target_size}` is not between 0 and 100 %", hint="`target_size=40%`")
        return int(original * share / 100)
