"""Asking a model: the demo page, and `dssk answer`."""
