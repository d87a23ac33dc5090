"""The option that says how weights that are not changed are stored; imports no torch."""

from typing import Any

from moetools.arguments import OUTPUT, option

OUTPUT_FORMATS = ("same", "bf16")


def output_format_option() -> Any:
    """The field `output_format` of every verb that chooses experts."""
    return option(
        None,
        "Weights of a packed input. same: every kept tensor byte for byte as it lies there; bf16: decoded. same if not "
        "given, where the command changes no packed weight.",
        metavar="FORMAT",
        panel=OUTPUT,
        choices=lambda: OUTPUT_FORMATS,
    )
