"""Decides: the router and the workers as pure objects, `on(now, event) -> orders`. Standard library only."""
