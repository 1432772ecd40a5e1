"""`layerskip-vllm soak`: mixed, broken and hostile traffic, each request accounted for."""
