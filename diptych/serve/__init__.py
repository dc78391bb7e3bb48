"""Waits: HTTP, processes, sockets; the live drivers of `policy/`."""
