"""What all tests of the embedded checkpoint run with."""

from tests.support.training import one_thread

__all__ = ["one_thread"]
