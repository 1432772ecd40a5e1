"""What is read from and written to a model's folder; every other part may use it, and it none."""
