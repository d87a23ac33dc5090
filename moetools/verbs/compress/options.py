"""What is asked of `compress`."""

from dataclasses import dataclass
from pathlib import Path

from moetools.arguments import DATA, OUTPUT, option
from moetools.errors import UserError
from moetools.plugins import unknown_name
from moetools.sizes import parse_bytes

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
        3, "Plans that are built and measured on held-out text before the best of them is taken.", metavar="N"
    )
    html: Path | None = option(
        None,
        "Also write the plans as one self-contained page, size against loss; a file that is there is replaced.",
        metavar="FILE.html",
        panel=OUTPUT,
        path="writes",
    )
    plan_only: bool = option(
        False, "Predict, show the frontier and write the plan to `out`-plan.yaml, a recipe for run; build nothing."
    )
    test: list[str] = option(
        [],
        "Held-out text that plans are judged on; if not given, the last fifth of each task's text is held out.",
        metavar="NAME=PATH",
        panel=DATA,
    )
    probe_tokens: int = option(
        16384,
        "Tokens of calibration text, and of held-out text, that single choices are tried out on.",
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
