"""The stores that the data tests make."""

from tests.data.conftest import finished, preprocess, source

__all__ = ["finished", "preprocess", "source"]
