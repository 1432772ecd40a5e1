"""Where vLLM is changed, and why."""
