"""LayerSkip's training recipe: layer dropout, early exit loss and their curricula.

Importing this package imports nothing; each piece is a module of its own, and none runs in vLLM.
"""
