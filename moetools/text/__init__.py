"""Text to token batches: sources, documents, tokens, choice items. Knows no model."""
