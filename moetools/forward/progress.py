"""How a long run tells what it is doing; the command line draws it, the library is silent."""

from typing import Protocol


class Progress(Protocol):
    """Receives the course of a pass over layers and tokens."""

    def start(self, task: str, *, layers: int, tokens: int) -> None:
        """A pass begins: `tokens` real tokens through each of `layers` layers."""

    def layer(self, index: int) -> None:
        """Layer `index` begins."""

    def advance(self, tokens: int) -> None:
        """`tokens` more went through the current layer."""

    def stop(self) -> None:
        """The pass is over, also when it failed."""


class Silent:
    """Shows nothing."""

    def start(self, task: str, *, layers: int, tokens: int) -> None: ...

    def layer(self, index: int) -> None: ...

    def advance(self, tokens: int) -> None: ...

    def stop(self) -> None: ...
