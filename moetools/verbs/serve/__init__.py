"""Which engines on this machine serve a checkpoint."""
