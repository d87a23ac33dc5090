"""Text from files and command lines made safe to show: on a terminal, in JSON, in Markdown and in HTML."""

import html
import re

_OBEYED = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff"
"""What terminals and browsers obey instead of showing: C0 and C1 controls, directions of text, halves of surrogates."""
_IN_TEXT = re.compile(f"[{_OBEYED}]")
_IN_LINE = re.compile(f"[{_OBEYED}\t\n]")
_MARKUP = re.compile(r"[\\`*<>&\[\]|]")


def printable(text: str, *, lines: bool = False) -> str:
    """`text` with every character that is obeyed instead of shown written as `\\u001b`, which JSON reads back.

    Args:
        lines: keep line breaks and tabs.
    """
    return (_IN_TEXT if lines else _IN_LINE).sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def in_markdown(text: str) -> str:
    """One line of Markdown that shows `text` and nothing else: no markup, no HTML."""
    return _MARKUP.sub(lambda found: f"\\{found[0]}", printable(text))


def in_code(text: str) -> str:
    """A code span of Markdown that shows `text`, whatever backticks it holds."""
    shown = printable(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{ticks}{shown}{ticks}" if len(ticks) == 1 else f"{ticks} {shown} {ticks}"


def in_html(text: str) -> str:
    """`text` for the content of an element or a quoted attribute."""
    return html.escape(printable(text, lines=True))
