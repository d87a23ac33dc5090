"""A seeded source of short worked arithmetic: sums, products and templated word problems with their steps.

Every problem is `Question: ...\\nAnswer: <steps> The answer is N.`. A solution is a small program (a list of
`Step`), so that a wrong solution can be made of the right one: one step slips and the slip is carried on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Anna Ben Clara David Emma Felix Grace Hugo Ida Jack Karen Leo Mia Noah Olga Paul Quinn Rosa Sam Tina "
    "Uma Victor Wendy Xavier Yara Zoe Alice Bruno Celia Dan Elsa Frank Gina Henry Irene James"
)
THINGS = _words("apples books pencils marbles stamps cookies cards shells coins stickers buttons oranges eggs roses")
GOODS = _words("ticket notebook lamp shirt cake ball hat kite puzzle scarf mug basket")
PLACES = ("the school", "the station", "the lake", "the farm", "the market", "the castle", "the harbour", "the museum")


@dataclass(frozen=True, kw_only=True)
class Ref:
    """The result of an earlier step, by its index."""

    step: int


Operand = int | Ref


@dataclass(frozen=True, kw_only=True)
class Step:
    """One written line of a solution: `left op right`, where op is one of `+ - x`."""

    left: Operand
    op: str
    right: Operand


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question, the steps that solve it and the unit of its answer (may be empty)."""

    question: str
    steps: tuple[Step, ...]
    unit: str = ""

    def solution(self, slip: tuple[int, int] | None = None) -> str:
        """The worked answer; with `slip = (step, error)` that step's result is off by `error`, carried on."""
        results: list[int] = []
        lines = []
        for i, step in enumerate(self.steps):
            left, right = (results[o.step] if isinstance(o, Ref) else o for o in (step.left, step.right))
            exact = {"+": left + right, "-": left - right, "x": left * right}[step.op]
            results.append(exact + (slip[1] if slip and slip[0] == i else 0))
            lines.append(f"{left} {step.op} {right} = {results[-1]}.")
        unit = f" {self.unit}" if self.unit else ""
        return f"{' '.join(lines)} The answer is {results[-1]}{unit}."

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.solution()}"


def _add(a: Operand, b: int, first: int = 0) -> tuple[Step, ...]:
    """Steps of a + b, b's tens before its units; `first` is the index of the first step."""
    tens, units = b - b % 10, b % 10
    if not tens or not units:
        return (Step(left=a, op="+", right=b),)
    return (Step(left=a, op="+", right=tens), Step(left=Ref(step=first), op="+", right=units))


def _subtract(a: Operand, b: int, first: int = 0) -> tuple[Step, ...]:
    """Steps of a - b, b's tens before its units."""
    tens, units = b - b % 10, b % 10
    if not tens or not units:
        return (Step(left=a, op="-", right=b),)
    return (Step(left=a, op="-", right=tens), Step(left=Ref(step=first), op="-", right=units))


def _multiply(a: int, b: int, first: int = 0) -> tuple[Step, ...]:
    """Steps of a x b for one-digit a: b's tens and units apart, then their sum."""
    tens, units = b - b % 10, b % 10
    if not tens or not units:
        return (Step(left=a, op="x", right=b),)
    return (
        Step(left=a, op="x", right=tens),
        Step(left=a, op="x", right=units),
        Step(left=Ref(step=first), op="+", right=Ref(step=first + 1)),
    )


def _plain(rng: random.Random) -> Problem:
    a, b = rng.randint(11, 299), rng.randint(2, 99)
    kind = rng.choice("+-x")
    if kind == "x":
        a, b = rng.randint(2, 9), rng.randint(2, 39)
    if kind == "-" and a < b:
        a, b = b, a
    ask = rng.choice(("What is {}?", "How much is {}?", "Work out {}.", "Find the value of {}."))
    steps = {"+": _add, "-": _subtract, "x": _multiply}[kind](a, b)
    return Problem(question=ask.format(f"{a} {kind} {b}"), steps=steps)


def _gift(rng: random.Random) -> Problem:
    one, two = rng.sample(NAMES, 2)
    thing, a, b = rng.choice(THINGS), rng.randint(12, 99), rng.randint(3, 89)
    ask = rng.choice(
        (
            "{one} has {a} {thing}. {two} gives {one} {b} more. How many {thing} does {one} have now?",
            "There are {a} {thing} in the box of {one} and {b} in the box of {two}. How many {thing} are there in all?",
            "{one} found {a} {thing} in the morning and {b} in the evening. How many {thing} did {one} find?",
        )
    )
    return Problem(question=ask.format(one=one, two=two, thing=thing, a=a, b=b), steps=_add(a, b), unit=thing)


def _loss(rng: random.Random) -> Problem:
    one, two = rng.sample(NAMES, 2)
    thing, b = rng.choice(THINGS), rng.randint(3, 59)
    a = b + rng.randint(2, 60)
    ask = rng.choice(
        (
            "{one} has {a} {thing} and gives {b} of them to {two}. How many {thing} are left?",
            "{one} had {a} {thing}. Then {one} lost {b}. How many {thing} does {one} still have?",
            "Of the {a} {thing} in the shop, {two} buys {b}. How many {thing} remain?",
        )
    )
    return Problem(question=ask.format(one=one, two=two, thing=thing, a=a, b=b), steps=_subtract(a, b), unit=thing)


def _change(rng: random.Random) -> Problem:
    name, good = rng.choice(NAMES), rng.choice(GOODS)
    price, note = rng.randint(3, 48), rng.choice((50, 60, 80, 100))
    ask = rng.choice(
        (
            "{name} buys a {good} for {price} dollars and pays with {note} dollars. How much change is due?",
            "A {good} costs {price} dollars. {name} has {note} dollars and buys one. How many dollars are left?",
        )
    )
    return Problem(
        question=ask.format(name=name, good=good, price=price, note=note), steps=_subtract(note, price), unit="dollars"
    )


def _shopping(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    good, other = rng.sample(GOODS, 2)
    count, price, extra = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    ask = rng.choice(
        (
            "{name} buys {count} times a {good} for {price} dollars each and a {other} for {extra} dollars. "
            "How much does {name} pay?",
            "Each {good} costs {price} dollars and a {other} costs {extra} dollars. "
            "What do {count} of the first and one of the second cost {name}?",
        )
    )
    steps = (Step(left=count, op="x", right=price), Step(left=Ref(step=0), op="+", right=extra))
    question = ask.format(name=name, good=good, other=other, count=count, price=price, extra=extra)
    return Problem(question=question, steps=steps, unit="dollars")


def _age(rng: random.Random) -> Problem:
    one, two = rng.sample(NAMES, 2)
    age, gap, years = rng.randint(4, 60), rng.randint(2, 9), rng.randint(2, 9)
    older = rng.random() < 0.5 or age <= gap + 1
    word, op = ("older", "+") if older else ("younger", "-")
    ask = rng.choice(("How old will {} be in {} years?", "What is the age of {} after {} years?"))
    question = f"{two} is {age} years old. {one} is {gap} years {word} than {two}. {ask.format(one, years)}"
    steps = (Step(left=age, op=op, right=gap), Step(left=Ref(step=0), op="+", right=years))
    return Problem(question=question, steps=steps, unit="years")


def _distance(rng: random.Random) -> Problem:
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    hours, speed = rng.randint(2, 9), rng.randint(4, 29)
    ask = rng.choice(
        (
            "{name} rides to {place} at {speed} km an hour and needs {hours} hours. How far is {place}?",
            "The way of {name} to {place} takes {hours} hours at {speed} km an hour. How long is the way?",
        )
    )
    question = ask.format(name=name, place=place, hours=hours, speed=speed)
    return Problem(question=question, steps=_multiply(hours, speed), unit="km")


def _remaining_way(rng: random.Random) -> Problem:
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    morning, noon = rng.randint(3, 29), rng.randint(2, 9)
    total = morning + noon + rng.randint(3, 50)
    question = (
        f"It is {total} km to {place}. {name} walks {morning} km in the morning and {noon} km after noon. "
        f"How many km are left?"
    )
    steps = (Step(left=morning, op="+", right=noon), Step(left=total, op="-", right=Ref(step=0)))
    return Problem(question=question, steps=steps, unit="km")


KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    _plain, _plain, _gift, _loss, _change, _shopping, _age, _distance, _remaining_way,
)  # fmt: skip


def problems(seed: int) -> Iterator[Problem]:
    """An endless seeded stream of problems in which no text comes twice."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        problem = rng.choice(KINDS)(rng)
        if problem.text not in seen:
            seen.add(problem.text)
            yield problem


def wrong_solutions(problem: Problem, count: int, rng: random.Random) -> list[str]:
    """`count` different worked answers with another final number, each with one slip carried on."""
    right = problem.solution()
    wrong: list[str] = []
    while len(wrong) < count:
        step = rng.randrange(len(problem.steps))
        candidate = problem.solution((step, rng.choice((-20, -10, -3, -2, -1, 1, 2, 3, 10, 20))))
        if candidate != right and candidate not in wrong and " -" not in candidate.replace(" - ", " "):
            wrong.append(candidate)
    return wrong
