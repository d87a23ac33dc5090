"""`compress`."""
