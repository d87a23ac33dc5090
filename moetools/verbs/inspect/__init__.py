"""`inspect` and `inspect-routing`."""
