"""Test suites of other projects, run on our classes."""
