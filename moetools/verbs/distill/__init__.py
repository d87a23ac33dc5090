"""`distill`: dense students."""
