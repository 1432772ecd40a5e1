"""What an operator runs: the commands of `layerskip-vllm`."""
