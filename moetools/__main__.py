"""`python -m moetools` is the `moetools` command."""

from moetools.cli import main

main()
