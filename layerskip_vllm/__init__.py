"""LayerSkip for vLLM: a model's own first layers draft, the whole model verifies.

Importing this package imports neither vLLM nor torch and changes nothing; vLLM calls
`layerskip_vllm.plugin.register` in each of its processes.
"""

__version__ = "0.1.0"
