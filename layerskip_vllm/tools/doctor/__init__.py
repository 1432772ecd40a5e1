"""`layerskip-vllm doctor`: what is installed, whether it fits, and what it would pick."""
