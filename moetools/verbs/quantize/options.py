"""What is asked of `quantize`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from moetools.arguments import default, option
from moetools.errors import UserError
from moetools.plugins import plugin_names, unknown_name

SCHEMES = (
    "w8a16",
    "w6a16",
    "w5a16",
    "w4a16",
    "w3a16",
    "w2a16",
    "ternary",
    "fp8",
    "fp8-block",
    "mxfp4",
    "nvfp4",
    "w8a8",
    "q6_k",
    "q5_k",
    "q4_k",
    "q3_k",
    "q2_k",
    "mixed",
    "sub1",
)
METHODS = tuple(plugin_names("moetools.methods.quantize"))
FORMATS = ("auto", "compressed-tensors", "moetools", "gguf", "mlx")
TARGETS = ("transformers", "vllm", "both")
MIXED_BITS = (2, 3, 4, 5, 6, 8)
"""Widths that `mixed` chooses among."""
DEFAULT_BITS = {"mixed": 2.5, "sub1": 0.9}
_RATES = (0.3, 6.0)


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What is asked of `quantize`."""

    scheme: str = option("w4a16", f"One of {', '.join(SCHEMES)}.", metavar="NAME", choices=lambda: SCHEMES)
    method: str = option("gptq", f"One of {', '.join(METHODS)}.", metavar="NAME", choices=lambda: METHODS)
    group_size: int | None = option(
        None,
        "Columns that share a scale; 0: one per row. [default: largest of 128, 64, 32, 16 that divides all rows]",
        metavar="N",
    )
    bits: float | None = option(
        None,
        "Average bits per routed-expert weight, of codes (mixed, 2.5) or of all that is stored (sub1, 0.9).",
        metavar="B",
    )
    experts_only: bool = option(False, "Quantize the routed experts and nothing else.")
    attention: str | None = option(
        None,
        "Scheme of the attention, sub1:BITS, or none. [default: `scheme`; w4a16 with ternary, mixed and sub1]",
        metavar="SCHEME",
    )
    embeddings: str | None = option(
        None,
        "Scheme of embeddings and head, or sub1:BITS; for the formats moetools, gguf and mlx. [default: none]",
        metavar="SCHEME",
    )
    asymmetric: bool = option(False, "Integers with a zero point.")
    format: str = option(
        "auto",
        "auto, compressed-tensors, moetools (any mix), gguf (also write `out`/model.gguf), or mlx (also `out`/mlx).",
        metavar="NAME",
        choices=lambda: FORMATS,
    )
    target: str = option(
        "transformers",
        "What must load the result: transformers, vllm or both.",
        metavar="LOADER",
        choices=lambda: TARGETS,
    )
    imatrix: Path | None = option(
        None,
        "With `format=gguf`: also write the importance matrix of the model on `data`, for llama.cpp's llama-quantize.",
        metavar="FILE.gguf",
        path="writes",
    )
    reference: Path | None = option(
        None,
        "The model that `model` was made of, or `model` itself: the experts' down projections are solved anew behind "
        "the rounded gates and ups for its hidden states, then rounded.",
        metavar="DIR",
        path="reads",
    )
    expand: bool = option(False, "Write the plain checkpoint that a quantized `model` stands for.")

    def check(self) -> None:
        """Refuse values that do not exist or contradict each other.

        Raises:
            UserError: naming the option.
        """
        if self.expand:
            self._check_alone()
        _known("scheme", self.scheme, SCHEMES)
        _known("format", self.format, FORMATS)
        _known("target", self.target, TARGETS)
        for part in ("attention", "embeddings"):
            asked = getattr(self, part)
            if asked not in (None, "none"):
                _check_part_scheme(part, asked)
            if self.experts_only and asked not in (None, "none"):
                raise UserError(f"`experts_only` and `{part}={asked}` contradict each other")
        if self.quantizes_embeddings and self.format == "compressed-tensors":
            raise UserError(
                "`embeddings`: stock transformers reads no packed embeddings",
                hint="`format=moetools` stores them, and so do gguf and mlx",
            )
        if self.imatrix is not None and self.format != "gguf":
            raise UserError(
                f"`imatrix` is for llama.cpp, `format={self.format}` writes nothing for it", hint="`format=gguf`"
            )
        if self.bits is not None and self.scheme not in DEFAULT_BITS:
            raise UserError(
                f"`bits` is for the schemes mixed and sub1; {self.scheme} has its own width",
                hint=f"`scheme=mixed` `bits={self.bits:g}`",
            )
        low, high = _RATES if self.scheme == "sub1" else (float(MIXED_BITS[0]), float(MIXED_BITS[-1]))
        if self.bits is not None and not low <= self.bits <= high:
            raise UserError(f"`bits={self.bits:g}`: {self.scheme} takes {low:g} to {high:g}")
        if self.asymmetric and not re.fullmatch(r"w\da16|mixed", self.scheme):
            raise UserError(f"`asymmetric`: {self.scheme} has no zero points", hint="w2a16 to w8a16 and mixed have")
        if self.group_size is not None and self.group_size < 0:
            raise UserError(f"`group_size={self.group_size}` is below 0", hint="0 gives one scale per row")

    def _check_alone(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name != "expand" and value != default(one):
                raise UserError(
                    f"`expand` writes plain weights, `{one.name}={value}` packs them",
                    hint="expand first, then quantize the plain checkpoint",
                )

    @property
    def quantizes_embeddings(self) -> bool:
        """Whether embeddings and head get codes."""
        return self.embeddings not in (None, "none")


def _check_part_scheme(part: str, asked: str) -> None:
    """A scheme's name, or sub1 with its rate."""
    scheme, _, bits = asked.partition(":")
    _known("scheme", scheme, [*(name for name in SCHEMES if name != "mixed"), "none"])
    low, high = _RATES
    if (scheme == "sub1") != bool(bits):
        raise UserError(
            f"`{part}={asked}`: only sub1 takes bits per weight, and it needs them", hint="sub1:3 for example"
        )
    if bits and not (re.fullmatch(r"\d+(\.\d+)?", bits) and low <= float(bits) <= high):
        raise UserError(f"`{part}={asked}`: sub1 takes {low:g} to {high:g} bits")


def _known(kind: str, name: str, legal: Sequence[str]) -> None:
    if name not in legal:
        raise unknown_name(kind, name, list(legal))
