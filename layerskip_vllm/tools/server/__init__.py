"""A running server: its metrics, its answers, what it is."""
