"""What all tests of training run with."""

from tests.support.training import own_cache

__all__ = ["own_cache"]
