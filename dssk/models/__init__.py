"""The frozen decoder and the cross-attention blocks placed into it."""
