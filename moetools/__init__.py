"""moetools: make trained Mixture-of-Experts language models cheap to serve, and prove the result."""

__version__ = "0.1.0"
