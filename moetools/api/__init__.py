"""The Python API: every verb of the catalogue as a function of `moetools`."""
