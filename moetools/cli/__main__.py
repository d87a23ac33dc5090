"""`python -m moetools.cli` is the `moetools` command."""

from moetools.cli import main

main()
