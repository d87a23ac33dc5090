"""Several processes that train together (torchrun, accelerate launch): who writes, and who waits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

from moetools.training.options import processes

_PATIENCE = timedelta(hours=24)


def join_processes(*, on_cpu: bool) -> bool:
    """Connect with the other processes, if there are any; whether this is the first."""
    if processes() == 1:
        return True
    from accelerate import PartialState

    return PartialState(cpu=on_cpu, backend="gloo" if on_cpu else None, timeout=_PATIENCE).is_main_process


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The first process runs the block, then the others do."""
    if processes() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
