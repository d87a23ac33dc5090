"""What a run keeps in its scratch folder for a run that is resumed: each file with its digest, or made again."""

from collections.abc import Callable
from pathlib import Path

from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.shards import file_digest
from moetools.forward.calibrate import ModelStatistics, load_statistics


def made_once(file: Path, make: Callable[[Path], None]) -> Path:
    """`file` as `make` has written it, in this run or in the interrupted one before; a damaged one is made again.

    Its SHA-256 lies beside it and is written last, so that a file without one is not whole.
    """
    record = file.with_name(f"{file.name}.sha256")
    if not (file.is_file() and record.is_file() and record.read_text() == file_digest(file)):
        record.unlink(missing_ok=True)
        make(file)
        write_durably(record, file_digest(file).encode())
    return file


def measured_once(file: Path, measure: Callable[[], ModelStatistics]) -> ModelStatistics:
    """Statistics that are measured once in a run and those that resume it."""
    return load_statistics(made_once(file, lambda kept: measure().save(kept)))
