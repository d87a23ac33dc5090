"""The long part of the fuzz suite: `python tests/fuzz/long_run.py --count 10000` prints a table of how inputs ended.

Every input runs in a forked child with limits on memory and CPU time. `--kind` chooses one kind, `--only NUMBER`
repeats a single input, `--keep DIR` keeps the inputs that were no success. Ctrl-C ends it with the table so far.
"""

import argparse
import contextlib
import importlib
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from kinds import KINDS, make_bases
from outcome import DEFECTS, outcome

SECONDS, EXTRA_BYTES, EXTRA_MEMORY = 20, 4 << 30, 300 << 20
"""CPU seconds of an input; address space beside that of the parent; resident memory beside it."""
_PRELOADED = (
    "moetools.hf", "moetools.verbs.distill.verb", "moetools.verbs.evaluate.verb", "moetools.verbs.inspect.routing",
    "moetools.verbs.inspect.verb", "moetools.verbs.quantize.verb", "moetools.verbs.reduce.verb", "pyarrow.parquet",
    "compressed_tensors", "transformers.models.qwen2_moe.modeling_qwen2_moe",
)  # fmt: skip
"""What most children need; imported once, before they are forked."""
_COLUMNS = ("injected", "refused", "accepted", "internal", "hang", "memory", "escapes", "crash")


def main() -> int:
    """0 if no input ended in a defect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="inputs of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(KINDS), action="append")
    parser.add_argument("--only", type=int, help="number of the one input to run, of the one --kind")
    parser.add_argument("--keep", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    kinds = chosen.kind or sorted(KINDS)
    table: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    memory = dict.fromkeys(kinds, 0)
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch,
        contextlib.suppress(KeyboardInterrupt),
    ):
        bases = _bases(Path(scratch))
        for module in _PRELOADED:
            importlib.import_module(module)
        numbers = range(chosen.count // len(kinds)) if chosen.only is None else [chosen.only]
        for number in numbers:
            for kind in kinds:
                ending, words, used = _forked(kind, f"{chosen.seed}:{kind}:{number}", bases, chosen.keep)
                table[kind].update(("injected", ending))
                memory[kind] = max(memory[kind], used)
                if ending in (*DEFECTS, "crash") or chosen.only is not None:
                    _say(f"{kind} {number}: {ending}: {_last_line(words)}" if chosen.only is None else words)
    _print_table(table, memory)
    return int(any(row[ending] for row in table.values() for ending in (*DEFECTS, "crash")))


def _bases(folder: Path) -> Path:
    """The good files, made in a child: a process whose thread pools were used cannot be forked."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            make_bases(folder)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the good files could not be made")
    return folder


def _forked(kind: str, seed: str, bases: Path, keep: Path | None) -> tuple[str, str, int]:
    """Ending, last words and bytes of memory beside the parent's."""
    folder = Path(tempfile.mkdtemp(dir=bases.parent, prefix="fuzz-"))
    said, start = folder / "said", folder / "start"
    child = os.fork()
    if child == 0:
        # What a child has of the parent's memory is less than the parent has.
        start.write_text(str(_pages(1)))
        _limited(lambda: _write(said, *_ended(kind, seed, bases, folder / "input")))
    status, usage = _waited(child)
    ending, _, words = said.read_text().partition("\n") if said.exists() else ("crash", "", f"signal or exit {status}")
    if not said.exists() and usage.ru_utime + usage.ru_stime >= SECONDS - 1:
        ending = "hang"
    used = max(0, (usage.ru_maxrss << 10) - int(start.read_text()))
    if ending in ("refused", "accepted") and used > EXTRA_MEMORY:
        ending, words = "memory", f"{used >> 20} MiB beside the parent's; {words}"
    if keep is not None and ending not in ("refused", "accepted"):
        shutil.copytree(folder, keep / seed.replace(":", "-"), dirs_exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    return ending, words, used


def _ended(kind: str, seed: str, bases: Path, folder: Path) -> tuple[str, str]:
    folder.mkdir()
    os.chdir(folder)
    return outcome(KINDS[kind](random.Random(seed), bases, folder), seconds=3 * SECONDS)


def _limited(action: Callable[[], None]) -> None:
    """Run under limits, then end the process without any cleaning up."""
    size = _pages(0)
    resource.setrlimit(resource.RLIMIT_AS, (size + EXTRA_BYTES, size + EXTRA_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        action()
    except BaseException:  # noqa: BLE001 - a defect of the suite; the parent says so
        traceback.print_exc()
    finally:
        os._exit(0)


def _pages(column: int) -> int:
    """Bytes of address space (column 0) or resident memory (1) of this process."""
    return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()


def _write(file: Path, ending: str, words: str) -> None:
    file.write_text(f"{ending}\n{words}", errors="backslashreplace")


def _waited(child: int) -> tuple[int, resource.struct_rusage]:
    deadline = time.monotonic() + 4 * SECONDS
    while time.monotonic() < deadline:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage
        time.sleep(0.002)
    os.kill(child, 9)
    _, status, usage = os.wait4(child, 0)
    return status, usage


def _last_line(words: str) -> str:
    lines = [line for line in words.strip().splitlines() if line and not line.startswith("hint:")]
    return (lines or [""])[-1][:300]


def _say(text: str) -> None:
    sys.stdout.write(text.encode("ascii", "backslashreplace").decode() + "\n")
    sys.stdout.flush()


def _print_table(table: dict[str, Counter[str]], memory: dict[str, int]) -> None:
    _say("| input | " + " | ".join(_COLUMNS) + " | most memory, MiB |")
    _say("|---|" + "---|" * (len(_COLUMNS) + 1))
    for kind, row in table.items():
        _say(f"| {kind} | " + " | ".join(str(row[column]) for column in _COLUMNS) + f" | {memory[kind] >> 20} |")
    whole = sum(table.values(), Counter())
    _say("| all | " + " | ".join(str(whole[column]) for column in _COLUMNS) + f" | {max(memory.values()) >> 20} |")


if __name__ == "__main__":
    sys.exit(main())
