"""`layerskip-vllm watch`: what a running server drafts and accepts, from its `/metrics`."""
