"""Multiple-choice items of the demo: which of a few candidate continuations is the true one."""

from __future__ import annotations

import random
from itertools import islice

from tests.demo.making import arithmetic

ITEMS = 200
CHOICE_SEED = 77

Item = dict[str, object]


def items(task: str, texts: list[str], known: set[str], count: int = ITEMS) -> list[Item]:
    """`count` items for a task from its test texts; the right answer's position cycles, so it is balanced.

    `known` holds every document of the task in any split; no arithmetic item is one of them.
    """
    rng = random.Random(CHOICE_SEED)
    if task == "arithmetic":
        return _arithmetic_items(known, count, rng)
    pairs = {"prose": _verse_pairs, "code": _line_pairs, "french": _sentence_pairs}[task](texts)
    return _continuation_items(pairs, count, rng)


def _item(prompt: str, right: str, wrong: list[str], position: int) -> Item:
    choices = list(wrong)
    choices.insert(position, right)
    return {"prompt": prompt, "choices": choices, "answer": position}


def _arithmetic_items(known: set[str], count: int, rng: random.Random) -> list[Item]:
    """The right worked answer among 4 with one slip carried on to the end."""
    fresh = (p for p in arithmetic.problems(seed=1) if p.text not in known)
    made = []
    for i, problem in enumerate(islice(fresh, count)):
        wrong = [f" {text}" for text in arithmetic.wrong_solutions(problem, 4, rng)]
        made.append(_item(problem.prompt, f" {problem.solution()}", wrong, i % 5))
    return made


def _verse_pairs(texts: list[str]) -> list[tuple[str, str]]:
    """(three verses and the first third of the next one, its rest), cut at a blank, so within a sentence."""
    pairs = []
    for text in texts:
        verses = text.split("\n")
        for i in range(3, len(verses)):
            at = verses[i].find(" ", len(verses[i]) // 3)
            if len(verses[i]) >= 90 and at > 0:
                pairs.append(("\n".join((*verses[i - 3 : i], verses[i][:at])), verses[i][at:]))
    return pairs


def _line_pairs(texts: list[str]) -> list[tuple[str, str]]:
    """(the eight lines before, the line) for lines of code that say something."""
    pairs = []
    for text in texts:
        lines = text.split("\n")
        for i in range(8, len(lines) - 1):
            if 20 <= len(lines[i].strip()) <= 70 and not lines[i].strip().startswith("#"):
                pairs.append(("\n".join(lines[i - 8 : i]) + "\n", lines[i].rstrip()))
    return pairs


def _sentence_pairs(texts: list[str]) -> list[tuple[str, str]]:
    """(the first part of a paragraph, the rest of it), cut at a blank in its middle."""
    paragraphs = [block for text in texts for block in text.split("\n") if 60 <= len(block) <= 700]
    cuts = ((block, block.find(" ", len(block) // 2)) for block in paragraphs)
    return [(block[:at], block[at:]) for block, at in cuts if at > 0]


def _indentation(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _continuation_items(pairs: list[tuple[str, str]], count: int, rng: random.Random) -> list[Item]:
    """The true continuation against the three continuations of the nearest length from a random sample of 30.

    The wrong ones get the blanks that the true one begins with: indentation alone would give it away.
    """
    made: list[Item] = []
    for prompt, right in rng.sample(pairs, min(count, len(pairs))):
        blanks = _indentation(right)
        others = {blanks + other.lstrip() for _, other in rng.sample(pairs, min(30, len(pairs)))} - {right}
        wrong = sorted(others, key=lambda other: (abs(len(other) - len(right)), other))[:3]
        made.append(_item(prompt, right, wrong, len(made) % 4))
    return made
