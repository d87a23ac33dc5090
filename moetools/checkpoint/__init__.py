"""Tensors on disk: a lazy reader, and a sharded, atomic, resumable writer. Knows no model."""
