"""What the tensors of a checkpoint mean, per model family."""
