"""What is asked of `demo`."""

from dataclasses import dataclass

from moetools.arguments import option


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What is asked of `demo`."""

    quick: bool = option(False, "Use less text; the numbers are rougher.")
