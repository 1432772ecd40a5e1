"""Measurements of vLLM with and without layer-skip drafting; `demo` is the one to start with."""
