"""Diptych: prefill/decode disaggregated inference for large language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diptych.offline import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> Any:
    """`diptych.LLM` is imported when it is asked for: most processes have no use for it."""
    if name == "LLM":
        from diptych.offline import LLM

        return LLM
    raise AttributeError(f"module 'diptych' has no attribute {name!r}")
