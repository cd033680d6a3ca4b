"""Baselines, cost measurements, and the makers of toys and small bases. Only commands import it."""
