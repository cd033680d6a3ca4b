"""Baselines, cost measurements, and the makers of toys and small bases. Nothing in the package imports it."""
