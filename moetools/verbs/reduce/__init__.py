"""`prune-experts` and `merge-experts`."""
