"""Where a model should exit: every layer measured on held-out text, for `layerskip-vllm exits`."""
