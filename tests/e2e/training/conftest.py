"""What all tests of training run with."""

from tests.support.training import one_thread, own_cache

__all__ = ["one_thread", "own_cache"]
