"""`quantize` and its `--expand`."""
