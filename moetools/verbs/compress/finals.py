"""The most promising plans, built on all of the text and measured; the best of them healed, and published."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.folder import read_json_object
from moetools.errors import VerificationError
from moetools.formats.reader import open_model
from moetools.pipeline.unchanged import Unchanged
from moetools.verbs.compress.building import Builder, commands
from moetools.verbs.compress.prediction import probe_of
from moetools.verbs.compress.report import RatedPlan
from moetools.verbs.compress.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class _Built:
    """A checkpoint that fits, and what made it."""

    folder: Path
    steps: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Finals:
    """Builds plans and takes the best.

    Attributes:
        name: of the output's folder, which every plan has in a folder of its own.
        budget: bytes of the weight files at most.
        checks: plans that are built.
        heal_minutes: of training the best one; None for none.
        kl: of a checkpoint, on held-out text.
        same_inputs: refuses what was built while the original changed.
    """

    name: str
    budget: int
    checks: int
    heal_minutes: float | None
    verify: bool
    builder: Builder
    kl: Callable[[Path], float]
    same_inputs: Unchanged
    work: Workspace

    def best(self, rated: Sequence[RatedPlan]) -> tuple[list[RatedPlan], _Built]:
        """The plans with what was measured of those that were built, and the best of these.

        One that comes out larger than the budget (entropy coding is met within about 1 %) gives way to the next.

        Raises:
            VerificationError: none fits.
        """
        found, fitting = list(rated), dict[int, _Built]()
        for number, one in enumerate(rated):
            if len(fitting) == self.checks:
                break
            found[number], built = self._built(one, self.work.plans / str(number) / self.name)
            if built is not None:
                fitting[number] = built
        if not fitting:
            raise VerificationError(f"no plan came out within {self.budget:,} bytes", hint="a larger `target_size`")
        best = min(fitting, key=lambda number: found[number].measured or 0.0)
        taken = fitting[best]
        if self.heal_minutes is not None:
            healed, built = self._healed(found[best], taken)
            found.insert(best + 1, healed)
            if built is not None and (healed.measured or 0.0) < (found[best].measured or 0.0):
                best, taken = best + 1, built
        found[best] = replace(found[best], chosen=True)
        return found, taken

    def publish(self, taken: _Built, out: Path, command: str, choice: dict[str, Any], *, overwrite: bool) -> None:
        """Put a plan in the place of the output, with the record of the choice."""
        folder = taken.folder
        whole = {
            **read_json_object(folder / "moetools.json"),
            "command": command,
            "compress": choice,
            "steps": taken.steps,
        }
        for name, text in (
            ("moetools.json", json.dumps(whole, indent=2, default=str)),
            ("README.md", (folder / "README.md").read_text()),
        ):
            write_durably(folder / name, text.replace(str(folder), str(out)).encode())
        self.work.publish(folder, overwrite=overwrite)

    def _built(self, one: RatedPlan, folder: Path) -> tuple[RatedPlan, _Built | None]:
        with self.same_inputs:
            steps = self.builder.build(probe_of(one.plan), folder, verify=self.verify)
            return self._measured(one, folder, steps)

    def _healed(self, one: RatedPlan, taken: _Built) -> tuple[RatedPlan, _Built | None]:
        """The best plan again, trained: behind its reduction, or else as it was built, without what is packed."""
        chain = commands(probe_of(one.plan), self.builder.target, self.heal_minutes)
        folder = taken.folder.parent / "healed" / self.name
        with self.same_inputs:
            if chain[-1][0].name == "distill":
                verb, options = chain[-1]
                steps = [*taken.steps, self.builder.carry_out(verb, taken.folder, folder, options, verify=self.verify)]
            else:
                steps = self.builder.build(
                    probe_of(one.plan), folder, verify=self.verify, heal_minutes=self.heal_minutes
                )
            return self._measured(replace(one, predicted=None, healed=True), folder, steps)

    def _measured(self, one: RatedPlan, folder: Path, steps: list[dict[str, Any]]) -> tuple[RatedPlan, _Built | None]:
        size = sum(header.file_bytes for header in open_model(folder).headers.values())
        found = replace(one, measured=self.kl(folder), file_bytes=size)
        if size <= self.budget:
            return found, _Built(folder=folder, steps=steps)
        shutil.rmtree(folder)
        return found, None
