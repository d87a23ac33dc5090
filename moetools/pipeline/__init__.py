"""The one way a checkpoint is written: check, plan memory, units, verify, report, commit."""
