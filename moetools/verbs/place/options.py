"""What is asked of `place-experts`."""

from dataclasses import dataclass
from pathlib import Path

from moetools.arguments import PLACEMENT, STATISTICS, option
from moetools.verbs.output_format_option import output_format_option


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """The devices, and statistics that are used again."""

    devices: int | None = option(
        None,
        "Devices that share the experts of every layer, each holding equally many consecutive ones.",
        metavar="N",
        panel=PLACEMENT,
    )
    stats: Path | None = option(
        None,
        "Take statistics that inspect-routing saved instead of measuring them.",
        metavar="FILE",
        panel=STATISTICS,
        path="reads",
    )
    output_format: str | None = output_format_option()
