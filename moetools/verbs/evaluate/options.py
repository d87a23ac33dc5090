"""What is asked of `evaluate`."""

import math
from dataclasses import dataclass
from pathlib import Path

from moetools.arguments import OUTPUT, option
from moetools.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is asked of `evaluate`."""

    reference: Path | None = option(
        None, "The original, for KL divergence and agreement.", metavar="MODEL", path="reads"
    )
    html: Path | None = option(
        None,
        "Also write the result as one self-contained page; a file that is there is replaced.",
        metavar="FILE.html",
        panel=OUTPUT,
        path="writes",
    )
    choices: list[str] = option([], "Multiple-choice items (.jsonl). Repeat it for several tasks.", metavar="NAME=PATH")
    generate: int | None = option(
        None,
        "Also continue the beginnings of texts by so many tokens, greedily, and count continuations that loop or leave "
        "the reference's.",
        metavar="TOKENS",
    )
    prompts: int = option(32, "Beginnings of each task that `generate` continues.", metavar="N")
    prompt_tokens: int = option(32, "Length of such a beginning, in tokens.", metavar="N")
    sampled: int | None = option(
        None,
        "Also draw so many continuations of each beginning, with `seed`, the same noise for every model.",
        metavar="N",
    )
    temperature: float = option(1.0, "Divides the logits that `sampled` draws from.", metavar="T")
    top_p: float = option(1.0, "Share of the probability that `sampled` draws from, the likeliest tokens.", metavar="P")
    structured: int | None = option(
        None,
        "Also answer so many chats of each task that name tools or a JSON schema, in `generate` tokens at most, and "
        "count valid answers.",
        metavar="N",
    )
    harness: list[str] = option(
        [],
        "Task of EleutherAI's evaluation harness (lm-eval), by its name or as a .yaml file. Repeat it for several.",
        metavar="TASK",
    )
    fewshot: int | None = option(None, "Examples in front of every question of `harness`.", metavar="N")
    limit: int | None = option(None, "Questions of each task of `harness`; all if not given.", metavar="N")
    gate: list[str] = option(
        [],
        "Exit with 3 if a model misses this bound, such as 'kl<=0.05'. Repeat it for several bounds.",
        metavar="METRIC<=VALUE",
    )

    def check(self, *, has_text: bool) -> None:
        """Refuse values that cannot be used.

        Raises:
            UserError: naming the option.
        """
        for name, least in (
            ("generate", 1),
            ("prompts", 1),
            ("prompt_tokens", 1),
            ("sampled", 1),
            ("structured", 1),
            ("limit", 1),
            ("fewshot", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"`{name}={value}` is below {least}")
            if name in ("limit", "fewshot") and value is not None and not self.harness:
                raise UserError(f"`{name}` is for the tasks of `harness`", hint="`harness=TASK`")
        if self.generate is not None and not has_text:
            raise UserError("`generate` continues the beginnings of texts", hint="`data`")
        if self.sampled is not None and self.generate is None:
            raise UserError("`sampled` draws continuations, and no length is given", hint="`generate=64`")
        if self.structured is not None and self.generate is None:
            raise UserError("`structured` answers chats, and no length is given", hint="`generate=256`")
        if self.sampled is None and (self.temperature, self.top_p) != (1.0, 1.0):
            raise UserError("`temperature` and `top_p` are for drawn continuations", hint="`sampled=4`")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"`temperature={self.temperature}` is not above 0", hint="the greedy ones are always made")
        if not 0 < self.top_p <= 1:
            raise UserError(f"`top_p={self.top_p}` is not above 0 and at most 1")
