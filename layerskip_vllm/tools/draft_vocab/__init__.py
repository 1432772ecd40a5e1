"""`layerskip-vllm draft-vocab`: the tokens that drafts choose among, counted from text."""
