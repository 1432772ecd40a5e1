"""`layerskip-vllm bench`: the paper's tasks on your model, plain vLLM and layerskip in turns."""
