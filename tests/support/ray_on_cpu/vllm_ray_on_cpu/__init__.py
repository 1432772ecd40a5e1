"""Ray's executor on a machine without GPUs, for development and tests."""
