"""Utilities of all rooms: files that are whole or absent, flags, the console, the ranks of a launch."""
