"""What pays on a machine, predicted and tried, for `layerskip-vllm tune`."""
