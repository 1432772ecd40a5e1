"""Drafting on vLLM's two model runners: `proposer` on V1, `speculator` on V2."""
