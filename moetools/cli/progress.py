"""Progress of a pass on stderr: a bar on a terminal, lines elsewhere."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moetools.printable import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

Clock = Callable[[], float]
_LIKE = 0.7
"""Layers whose weights differ by less than this factor are alike."""
_WINDOW = 8
"""Layers whose time says how long the others will take: those that a resumed run reads back are soon forgotten."""


class Pace:
    """How far a pass is and how fast.

    With N tokens through each of L layers, work is counted in layer-tokens, N * L in all. tokens/s are tokens through
    the whole model: layer-tokens done / L / seconds. Layers that a resumed pass leaves out count as done, not as speed.
    A pass without tokens counts layers alone and has no tokens/s.

    From the second layer on, the time that is left is that of the layers that are left, each as long as the last ones
    like it: what a layer does besides passing tokens on, such as solving, counts as well.
    """

    def __init__(
        self,
        task: str,
        *,
        layers: int,
        tokens: int,
        weights: Sequence[float] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.task, self.layers, self.tokens = printable(task), layers, tokens
        self.current, self.phase = 0, ""
        self._weights = [1.0] * layers if weights is None else list(weights)
        self._took: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._entered: float | None = None
        self._clock, self._began = clock, clock()
        self._per_layer = tokens or 1
        self._done = 0
        self._skipped: int | None = None

    @property
    def total(self) -> int:
        return self.layers * self._per_layer

    @property
    def done(self) -> int:
        return min(self._done, self.total)

    @property
    def complete(self) -> bool:
        """Whether all is done; without tokens, whether the last layer began."""
        return self._done >= self.total - (0 if self.tokens else 1)

    def layer(self, index: int) -> None:
        now = self._clock()
        if self._entered is not None:
            self._took.append((self._weights[self.current], now - self._entered))
        self.current, self.phase, self._entered = index, "", now
        before = index * self._per_layer
        if self._skipped is None:
            self._skipped = before
        self._done = max(self._done, before)

    def advance(self, tokens: int) -> None:
        if self.tokens:
            self._done += tokens

    @property
    def seconds(self) -> float:
        return self._clock() - self._began

    @property
    def tokens_per_second(self) -> float | None:
        """None until something was measured, and in a pass without tokens."""
        return self._rate / self.layers if self.tokens and self._rate else None

    @property
    def remaining(self) -> float | None:
        """Seconds to the end at this speed; None while no layer of a kind that is still to come was measured."""
        if self._entered is None or self.layers == 1 or not any(seconds for _, seconds in self._took):
            return (self.total - self.done) / self._rate if self._rate else None
        left = [self._expected(weight) for weight in self._weights[self.current :]]
        if None in left:
            return None
        first, *others = (seconds for seconds in left if seconds is not None)
        return max(0.0, first - (self._clock() - self._entered)) + sum(others)

    def _expected(self, weight: float) -> float | None:
        """Seconds of a layer of this weight, by the last ones like it: a dense layer tells nothing of an MoE layer."""
        like = [seconds for one, seconds in self._took if _LIKE * weight <= one <= weight / _LIKE]
        return sum(like) / len(like) if like else None

    @property
    def _rate(self) -> float:
        """Work per second; 0 until something was done."""
        return (self._done - (self._skipped or 0)) / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        rate, remaining = self.tokens_per_second, self.remaining
        speed = "" if rate is None else f"  {rate:,.0f} tokens/s"
        eta = "" if remaining is None else f"  ETA {format_seconds(remaining)}"
        doing = f" {self.phase}" if self.phase else ""
        return f"layer {min(self.current + 1, self.layers)}/{self.layers}{doing}{speed}{eta}"


class BarProgress:
    """One bar per pass, which disappears when the pass is over."""

    def __init__(self, console: "Console", *, clock: Clock = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._bar: RichProgress | None = None
        self._pace: Pace | None = None

    def start(self, task: str, *, layers: int, tokens: int, weights: Sequence[float] | None = None) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self.stop()
        self._pace = Pace(task, layers=layers, tokens=tokens, weights=weights, clock=self._clock)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[pace]}", markup=False),
        )
        self._bar = RichProgress(*columns, console=self._console, transient=True)
        self._bar.add_task(self._pace.task, total=max(self._pace.total, 1), pace=str(self._pace))
        self._bar.start()

    def layer(self, index: int) -> None:
        if self._pace:
            self._pace.layer(index)
            self._draw(self._pace)

    def phase(self, name: str) -> None:
        if self._pace:
            self._pace.phase = name
            self._draw(self._pace)

    def advance(self, tokens: int) -> None:
        if self._pace:
            self._pace.advance(tokens)
            self._draw(self._pace)

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()
        self._bar = self._pace = None

    def _draw(self, pace: Pace) -> None:
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=pace.done, pace=str(pace))


class LineProgress:
    """One line when a pass is over, and one a minute while it runs."""

    def __init__(self, write: Callable[[str], None], *, clock: Clock = time.monotonic, every: float = 60.0) -> None:
        self._write, self._clock, self._every = write, clock, every
        self._pace: Pace | None = None
        self._last = 0.0

    def start(self, task: str, *, layers: int, tokens: int, weights: Sequence[float] | None = None) -> None:
        self._pace = Pace(task, layers=layers, tokens=tokens, weights=weights, clock=self._clock)
        self._last = self._clock()

    def layer(self, index: int) -> None:
        if self._pace:
            self._pace.layer(index)
            self._tell(self._pace)

    def phase(self, name: str) -> None:
        if self._pace:
            self._pace.phase = name
            self._tell(self._pace)

    def advance(self, tokens: int) -> None:
        if self._pace:
            self._pace.advance(tokens)
            self._tell(self._pace)

    def stop(self) -> None:
        pace, self._pace = self._pace, None
        if pace is None:
            return
        rate = pace.tokens_per_second
        tokens = f", {pace.tokens:,} tokens" if pace.tokens else ""
        speed = "" if rate is None else f" ({rate:,.0f} tokens/s)"
        end = "" if pace.complete else f", stopped in layer {pace.current + 1}"
        self._write(f"{pace.task}: {pace.layers} layers{tokens}, {format_seconds(pace.seconds)}{speed}{end}")

    def _tell(self, pace: Pace) -> None:
        if self._clock() - self._last >= self._every:
            self._last = self._clock()
            self._write(f"{pace.task}: {pace}")


def progress_on(console: "Console") -> BarProgress | LineProgress:
    """A bar on a terminal, lines elsewhere."""
    return BarProgress(console) if console.is_terminal else LineProgress(console.print)


def format_seconds(seconds: float) -> str:
    """`0.8 s`, `42 s`, `3:07` or `1:02:03`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, left = divmod(whole, 60)
    return f"{minutes}:{left:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{left:02d}"
