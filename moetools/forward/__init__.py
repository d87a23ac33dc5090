"""The one way to run a model: text to token batches, and decoder layers streamed over them one at a time."""
