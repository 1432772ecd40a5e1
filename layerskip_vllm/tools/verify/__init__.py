"""`layerskip-vllm verify`: does speculation lose anything on this model and this machine?"""
