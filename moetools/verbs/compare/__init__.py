"""`compare`."""
