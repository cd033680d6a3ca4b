"""Encoded contexts on disk: their format, checking it, and libraries that grow."""
