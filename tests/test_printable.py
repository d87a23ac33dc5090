"""Nothing that a terminal, a browser or Markdown obeys comes through."""

import json
import re
from html.parser import HTMLParser

import pytest

from moetools.printable import in_code, in_html, in_markdown, printable

OBEYED = "\x1b[2J\x07\x00\x7f\x9b31m\u202e\u2066\u2028\ud800\r"
SHOWN = r"\u001b[2J\u0007\u0000\u007f\u009b31m\u202e\u2066\u2028\ud800\u000d"


def test_controls_are_shown_escaped_and_text_stays() -> None:
    assert printable(OBEYED) == SHOWN
    assert printable("Größe 模型 🙂 a\\b") == "Größe 模型 🙂 a\\b"
    assert printable("a\n\tb") == r"a\u000a\u0009b"
    assert printable("a\n\tb\x1b", lines=True) == "a\n\tb\\u001b"


def test_escaped_json_reads_back_the_same() -> None:
    value = {"name": "\x9b\u202e\x7f\u2028 line\nbreak"}
    text = printable(json.dumps(value, ensure_ascii=False, indent=1), lines=True)
    assert json.loads(text) == value
    assert text.isascii()


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a`b", "``", "[x](javascript:y)", "a|b", "x\n# title"])
def test_markdown_shows_names_as_text(name: str) -> None:
    shown = in_markdown(name)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)[`<>|\[\]]", shown)
    ticks, inner = re.fullmatch(r"(`+) ?(.*?) ?\1", in_code(name)).groups()  # type: ignore[union-attr]
    assert ticks not in inner
    assert "\n" not in inner


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '" onload="x', "' onload='x", "a&lt;b", OBEYED])
def test_html_shows_names_as_text(name: str) -> None:
    seen: list[tuple[str, dict[str, str | None]]] = []
    texts: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.append((tag, dict(attrs)))

        def handle_data(self, data: str) -> None:
            texts.append(data)

    Parser().feed(f'<p title="{in_html(name)}">{in_html(name)}</p>')
    assert seen == [("p", {"title": printable(name, lines=True)})]
    assert "".join(texts) == printable(name, lines=True)
