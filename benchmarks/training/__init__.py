"""Benchmarks of the training recipe."""
