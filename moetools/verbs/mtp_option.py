"""The option that says what becomes of multi-token-prediction layers; imports no torch."""

from typing import Any

from moetools.arguments import OUTPUT, option

MTP_MODES = ("follow", "drop", "keep")


def mtp_option() -> Any:
    """The field `mtp` of every verb that changes the number of experts."""
    return option(
        None,
        "Multi-token-prediction layers. follow: their experts are reduced like any layer's; drop: they are left out; "
        "keep: as they are, if that loads. follow if not given, drop where that cannot be.",
        metavar="HOW",
        panel=OUTPUT,
        choices=lambda: MTP_MODES,
    )
