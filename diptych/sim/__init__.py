"""Pretends: the virtual-time driver of `policy/`, with costs instead of hardware."""
