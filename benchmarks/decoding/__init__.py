"""Benchmarks of engines without a server."""
