"""Cached context for frozen StarCoder-family models through a few trained cross-attention blocks."""
