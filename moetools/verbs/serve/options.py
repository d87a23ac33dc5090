"""What is asked of `serve-check`."""

from dataclasses import dataclass

from moetools.arguments import option
from moetools.errors import UserError

DEFAULT_PROMPT = "In 1998 seven of them were there, and each one knew another trade: def add(a, b): return a + b"
SHORTEST = 2


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Engines, and what they are tried with."""

    engine: list[str] = option(
        [],
        "Engine that must serve it: transformers, moetools.hf, vllm, sglang, llama.cpp, mlx; with =PYTHON if it lives "
        "in an environment of its own. Repeat it for several; all that this Python has if not given.",
        metavar="NAME[=PYTHON]",
    )
    prompt: str = option(DEFAULT_PROMPT, "Text whose tokens are scored.", metavar="TEXT")
    tolerance: float = option(
        0.1,
        "Largest mean difference of the tokens' log-probabilities, as a share of their standard deviation.",
        metavar="SHARE",
    )
    timeout: int = option(600, "Seconds an engine may take.", metavar="SECONDS")

    def check(self) -> None:
        """Refuse values that cannot be used.

        Raises:
            UserError: naming the option.
        """
        if not 0 < self.tolerance < 1:
            raise UserError(f"`tolerance={self.tolerance}` is not between 0 and 1")
        if self.timeout < 1:
            raise UserError(f"`timeout={self.timeout}` is below 1")
        if not self.prompt.strip():
            raise UserError("`prompt` is empty")
