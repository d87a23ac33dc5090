"""Short training of compressed models against the original's logits."""
