"""One file per quantized layout; `FORMAT` is its `moetools.formats.base.Format`."""
