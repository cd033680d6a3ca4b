"""Experiments as jobs of a cluster: submission through haven, the W&B key, and the table of results."""
