"""What one layer asks of attention beyond softmax(QK)V, read from the keywords transformers hands over.

A `Features` value is all that a kernel needs to know of a model. What is asked for and not known is refused here, in
words. Not responsible for computing any of it (`attention.py`, `plain.py`), nor for whether a layer asks for all that
it needs: `probe.py` finds that out.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diptych.errors import UnsupportedModel

# Tensors that come along and say nothing that our own batch does not know.
_HARMLESS = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "cache_position"}


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """How one layer attends.

    `scale` multiplies the scores. A query sees itself and the `window - 1` tokens before it (None: all of them).
    `softcap` c turns a score s into c * tanh(s / c). `sinks` [query heads] are scores that take part in the softmax
    and bring no value (Xiao et al. 2023, as learned by gpt-oss).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def fused(self) -> bool:
        """Whether torch's scaled_dot_product_attention with a mask can do it."""
        return self.softcap is None and self.sinks is None


def features_of(module: Any, head_dim: int, mask: Tensor | None, asked: dict[str, Any]) -> Features:
    """The features of a layer (an attention module of transformers) from the keywords of its attention call."""
    if mask is not None:
        raise UnsupportedModel("the model makes attention masks of its own, which the paged pool cannot follow")
    if asked.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModel("a layer attends to later tokens as well (it is not causal)")
    for name, value in asked.items():
        if isinstance(value, Tensor) and name != "s_aux" and name not in _HARMLESS:
            raise UnsupportedModel(f"its attention wants {name!r}, which is not supported")
    scale = asked.get("scaling")
    return Features(
        head_dim**-0.5 if scale is None else float(scale),
        asked.get("sliding_window") or None,
        asked.get("softcap") or None,
        asked.get("s_aux"),
    )
