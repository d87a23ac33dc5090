"""The fault driver: `python tests/faults/long_run.py --kills 500` prints what was injected, survived and lost.

Every writing verb is killed at every line of its journal and at random steps and moments, gets SIGINT and SIGTERM, a
failing or full disk, an input that changes, and a second run on its OUT. `--verb` and `--kind` choose, `--only NUMBER`
repeats one trial. Ctrl-C ends it with the table so far.
"""

import argparse
import contextlib
import errno
import importlib
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent))
sys.path.insert(2, str(Path(__file__).parent.parent / "pipeline"))

import torch
import transformers
from injection import (
    DAMAGES,
    PHASES,
    damaged_at_read,
    failing_disk,
    full_disk,
    limited_files,
    short_reads,
    signal_at_line,
    signal_at_step,
)
from trial import LostError, Place, Reference, damaging, kill_chain, measured, source_fault, two_runs
from writing_verbs import CASES, CHAINS, Material

_PRELOADED = (
    "accelerate", "moetools.training.trainer", "moetools.verbs.train.training", "compressed_tensors",
    "transformers.models.mixtral.modeling_mixtral", "transformers.trainer",
)  # fmt: skip
"""What most children need; imported once, before they are forked."""

Trial = Callable[[str, random.Random, "Bench"], int]


class Bench:
    """Where trials run, and what an uninterrupted run of each verb does."""

    def __init__(self, folder: Path, verbs: list[str]) -> None:
        self.folder, self.verbs = folder, verbs
        self.material = Material(folder / "material")
        self.references: dict[str, Reference] = {}

    def reference(self, verb: str) -> Reference:
        if verb not in self.references:
            self.references[verb] = measured(verb, self.material, self.folder)
        return self.references[verb]

    def place(self) -> Place:
        return Place(self.material, self.folder)

    def own(self, place: Place) -> Material:
        """A copy of the material that a trial may damage."""
        own = Material(place.folder / "material")
        shutil.copytree(self.material.folder, own.folder)
        place.material = own
        return own


def journal(verb: str, rng: random.Random, bench: Bench, *, at: tuple[int, str] | None = None) -> int:
    """SIGKILL at a line of the journal, then perhaps at others of the resumed runs."""
    reference = bench.reference(verb)
    first = at or (1 + rng.randrange(reference.lines), rng.choice(PHASES))
    later = [(1 + rng.randrange(3), rng.choice(PHASES)) for _ in range(rng.randrange(4))]
    faults = [partial(signal_at_line, *where, signal.SIGKILL) for where in (first, *later)]
    with bench.place() as place:
        return kill_chain(verb, place, reference, faults, rng)


def step(verb: str, rng: random.Random, bench: Bench, *, which: int = signal.SIGKILL) -> int:
    """A signal before a random step, then perhaps before others of the resumed runs."""
    reference = bench.reference(verb)
    most = [reference.steps, *(reference.steps // 2 for _ in range(rng.randrange(3)))]
    faults = [partial(signal_at_step, 1 + rng.randrange(steps), which) for steps in most]
    with bench.place() as place:
        return kill_chain(verb, place, reference, faults, rng)


def moment(verb: str, rng: random.Random, bench: Bench) -> int:
    """SIGKILL, SIGINT or SIGTERM from outside at random moments."""
    reference = bench.reference(verb)
    signals = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
    faults = [(rng.random() * reference.seconds, rng.choice(signals)) for _ in range(3)]
    with bench.place() as place:
        return kill_chain(verb, place, reference, faults, rng)


def disk(verb: str, rng: random.Random, bench: Bench) -> int:
    """A step fails, files may not get longer, or the disk is full."""
    reference = bench.reference(verb)
    number, code = 1 + rng.randrange(reference.steps), rng.choice((errno.ENOSPC, errno.EIO))
    fault = rng.choice((
        partial(failing_disk, number, code, lasting=rng.random() < 0.5),
        partial(limited_files, 4096 + rng.randrange(reference.longest_file)),
        partial(full_disk, rng.randrange(2 * reference.bytes)),
    ))  # fmt: skip
    with bench.place() as place:
        return kill_chain(verb, place, reference, [fault], rng)


def short(verb: str, rng: random.Random, bench: Bench) -> int:
    """Reads give less than what was asked for."""
    with bench.place() as place:
        kill_chain(verb, place, bench.reference(verb), [partial(short_reads, rng.randrange(2**32))], rng)
        return 1


def source(verb: str, rng: random.Random, bench: Bench) -> int:
    """The model that is read changes, gets shorter or vanishes."""
    reference = bench.reference(verb)
    damage = rng.choice(DAMAGES)
    with bench.place() as place:
        own = bench.own(place)
        model = getattr(own, rng.choice([one for one in (CASES | CHAINS)[verb].reads if one not in ("low", "high")]))
        surely = rng.random() < 0.6 and model.name != "student"
        number, seconds = 1 + rng.randrange(reference.reads), rng.random() * reference.seconds
        fault = partial(damaged_at_read, number, model, damage) if surely else (seconds, damaging(model, damage))
        return source_fault(verb, place, reference, fault, surely=surely)


def two(verb: str, rng: random.Random, bench: Bench) -> int:
    """Two runs on one OUT."""
    other = rng.choice((verb, rng.choice([one for one in bench.verbs if one in CASES] or [verb])))
    # Chains know of others by the folders of their own kind.
    other = other if verb in CASES else verb
    first, second = bench.reference(verb), bench.reference(other)
    with bench.place() as place:
        return two_runs((verb, other), place, (first, second), rng.random() * first.seconds)


KINDS: dict[str, Trial] = {
    "SIGKILL at a journal line": journal,
    "SIGKILL at a step": step,
    "SIGINT at a step": partial(step, which=signal.SIGINT),
    "SIGTERM at a step": partial(step, which=signal.SIGTERM),
    "a signal at a moment": moment,
    "full or failing disk": disk,
    "short reads": short,
    "a model that changes": source,
    "two runs": two,
}
SIGNALS = tuple(KINDS)[:5]


def main() -> int:
    """0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500, help="signals of all kinds together, at least")
    parser.add_argument("--rounds", type=int, default=3, help="trials of each kind per verb before that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", choices=sorted(CASES | CHAINS), action="append")
    parser.add_argument("--kind", choices=sorted(KINDS), action="append")
    parser.add_argument(
        "--walk", action=argparse.BooleanOptionalAction, default=True, help="every line of every journal"
    )
    parser.add_argument("--only", type=int, help="number of the one trial to run, of one --verb and one --kind")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    verbs, kinds = chosen.verb or list(CASES | CHAINS), chosen.kind or list(KINDS)
    table = {(verb, kind): Counter[str]() for verb in verbs for kind in kinds}
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch,
        contextlib.suppress(KeyboardInterrupt),
    ):
        bench = Bench(Path(scratch), verbs)
        _forked(lambda: Material.make(bench.material.folder))
        for module in _PRELOADED:
            importlib.import_module(module)
        _run(_trials(chosen, verbs, kinds, bench), chosen, bench, table)
    _print_table(table, verbs, kinds, time.monotonic() - start)
    return int(any(row["lost"] for row in table.values()))


def _run(
    trials: Iterator[tuple[str, str, object, Trial]],
    chosen: argparse.Namespace,
    bench: Bench,
    table: dict[tuple[str, str], "Counter[str]"],
) -> None:
    """Run trials until all rounds and the walk are done and there were enough signals."""
    for verb, kind, number, trial in trials:
        signals = sum(row["injected"] for (_, one), row in table.items() if one in SIGNALS)
        if isinstance(number, int) and number >= chosen.rounds and signals >= chosen.kills and chosen.only is None:
            return
        row = table[verb, kind]
        try:
            row["injected"] += trial(verb, random.Random(f"{chosen.seed}:{verb}:{kind}:{number}"), bench)
        except LostError as lost:
            row.update(("injected", "lost"))
            _say(f"{verb}, {kind}, {number}: {lost}")


def _trials(
    chosen: argparse.Namespace, verbs: list[str], kinds: list[str], bench: Bench
) -> Iterator[tuple[str, str, object, Trial]]:
    """(verb, kind, number, trial): rounds of all kinds, the walk over every line, rounds of signals without end."""
    if chosen.only is not None:
        yield verbs[0], kinds[0], chosen.only, KINDS[kinds[0]]
        return
    for number in range(chosen.rounds):
        for verb in verbs:
            yield from ((verb, kind, number, KINDS[kind]) for kind in kinds)
    signals = [kind for kind in kinds if kind in SIGNALS]
    for verb in verbs if SIGNALS[0] in kinds and chosen.walk else ():
        for line in range(1, 1 + bench.reference(verb).lines):
            for phase in PHASES:
                yield verb, SIGNALS[0], f"line {line} {phase}", partial(journal, at=(line, phase))
    for number in itertools.count(chosen.rounds) if signals else ():
        for verb in verbs:
            yield from ((verb, kind, number, KINDS[kind]) for kind in signals)


def _forked(action: Callable[[], object]) -> None:
    """In a child: a process whose thread pools were used cannot be forked."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the inputs could not be made")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _print_table(
    table: dict[tuple[str, str], Counter[str]], verbs: list[str], kinds: list[str], seconds: float
) -> None:
    """Rows: verbs; cells: injected, survived, lost."""

    def cell(rows: list[Counter[str]]) -> str:
        injected, lost = (sum(row[one] for row in rows) for one in ("injected", "lost"))
        return f"{injected} / {injected - lost} / {lost}"

    _say(f"injected / survived / lost, {seconds:.0f} s")
    _say("| verb | " + " | ".join(kinds) + " | all |")
    _say("|---|" + "---|" * (len(kinds) + 1))
    for verb in verbs:
        rows = [table[verb, kind] for kind in kinds]
        _say(f"| {verb} | " + " | ".join(cell([row]) for row in rows) + f" | {cell(rows)} |")
    columns = [[table[verb, kind] for verb in verbs] for kind in kinds]
    _say("| all | " + " | ".join(cell(rows) for rows in columns) + f" | {cell(list(table.values()))} |")


if __name__ == "__main__":
    sys.exit(main())
