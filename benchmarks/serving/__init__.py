"""Benchmarks of `vllm serve`, the demo among them."""
