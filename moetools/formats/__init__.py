"""How quantized tensors are packed on disk, and how they are read back."""
