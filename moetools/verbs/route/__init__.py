"""`route-tasks`."""
