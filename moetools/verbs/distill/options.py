"""What is asked of `distill`."""

from dataclasses import dataclass
from pathlib import Path

from moetools.arguments import option
from moetools.errors import UserError
from moetools.plugins import plugin_names

INITS = tuple(plugin_names("moetools.methods.distill"))
SCALINGS = ("uniform", "marginal")
_STUDENT = "Student"
_LOCAL_STEPS = 300


@dataclass(frozen=True, kw_only=True)
class StudentOptions:
    """The student to make, or the one to train."""

    init: str = option(
        "neurons",
        f"How each FFN starts: one of {', '.join(INITS)}.",
        metavar="NAME",
        panel=_STUDENT,
        choices=lambda: INITS,
    )
    width: int | None = option(
        None, "Neurons of every FFN; as many as a token uses in the teacher.", metavar="N", panel=_STUDENT
    )
    layers: int | None = option(None, "Decoder layers, evenly spaced; all if not given.", metavar="N", panel=_STUDENT)
    scaling: str = option(
        "uniform",
        "Experts' neurons are scaled by the mean routing weight (uniform) or each expert's own (marginal).",
        metavar="HOW",
        panel=_STUDENT,
        choices=lambda: SCALINGS,
    )
    warm_start: bool = option(
        True,
        "Fit every FFN to what its MoE block did, in closed form and layer after layer.",
        flags="--warm-start/--no-warm-start",
        panel=_STUDENT,
    )
    local_steps: int | None = option(
        None,
        f"Gradient steps of the warm start on each FFN alone; 0 for none, {_LOCAL_STEPS} if not given.",
        metavar="N",
        panel=_STUDENT,
    )
    calibration: list[str] = option(
        [],
        "Text to fit the layers on, in place of the first 64 sequences of every task (all of them if nothing is "
        "trained).",
        metavar="NAME=PATH",
        panel=_STUDENT,
    )
    student: Path | None = option(
        None,
        "Train this checkpoint instead of making a student: healing.",
        metavar="DIR",
        panel=_STUDENT,
        path="reads",
    )

    @property
    def steps_alone(self) -> int:
        """Gradient steps on each FFN alone; without the warm start there are none."""
        if self.local_steps is None:
            return _LOCAL_STEPS if self.warm_start else 0
        return self.local_steps

    def check(self) -> None:
        """Refuse values that cannot be used.

        Raises:
            UserError: a value out of range, or local steps without the warm start.
        """
        if self.scaling not in SCALINGS:
            raise UserError(f"`scaling={self.scaling}` is unknown; legal: {', '.join(SCALINGS)}")
        for name, least in (("width", 1), ("local_steps", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"`{name}={value}` is below {least}")
