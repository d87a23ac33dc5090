"""Compression methods: pure tensor maths from statistics and layer weights to a decision and new layer weights."""
