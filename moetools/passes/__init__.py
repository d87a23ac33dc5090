"""Sequential compression, layer after layer: two streams, a layer's least-squares problems, new layers."""
