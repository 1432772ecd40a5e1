"""How the embedded checkpoint `checkpoints/stdlib-24l` is made."""
