"""Weights of linear layers in the order in which oneDNN reads them: in bfloat16 on the CPU, a fifth off a decode step.

The operators are torch's own but private, so each shape is tried on random input and compared before it is used;
where that fails, layers stay as they are and only speed is lost. A packed layer's original weight is freed, unless
something else holds it (an embedding that shares it). Not responsible for other dtypes or devices, nor for the model.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

_ROWS = 32  # rows of input that oneDNN is told to expect when it picks an order; it takes any number of them
_TOLERANCE = 0.02  # relative: bfloat16 carries 8 bits, and the two sums are taken in different orders


class PackedLinear(nn.Module):
    """What `nn.Linear` computes, with its weight packed; weight [out, in] bfloat16, input [..., in]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Not a parameter or buffer: it is opaque, and nothing that walks over those could do anything with it.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out

    def extra_repr(self) -> str:
        """As nn.Linear shows itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self._bias is not None}"


def pack_linears(module: nn.Module) -> int:
    """Replace the linear layers of a bfloat16 model on the CPU, in place; returns how many (0 where it cannot be)."""
    tried: dict[tuple[int, int, bool], bool] = {}
    packed: dict[nn.Linear, PackedLinear] = {}  # a layer used in two places stays one
    for parent, name, linear in list(_places(module)):
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        if shape not in tried:
            tried[shape] = _works(linear)
        if tried[shape]:
            if linear not in packed:
                packed[linear] = PackedLinear(linear)
            setattr(parent, name, packed[linear])
    if not all(tried.values()):
        log.info("%d of %d shapes of linear layers stay unpacked", list(tried.values()).count(False), len(tried))
    return len(packed)


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Where layers that can be packed hang: (parent, attribute, layer)."""
    for parent in module.modules():
        for name, child in parent._modules.items():  # named_children() would name a layer used twice only once
            if type(child) is nn.Linear and _can_be_packed(child):
                yield parent, name, child


def _can_be_packed(linear: nn.Linear) -> bool:
    """Not a subclass either: it may compute something else; and a hook may expect the weight."""
    if linear._forward_hooks or linear._forward_pre_hooks:
        return False
    return linear.weight.dtype == torch.bfloat16 and linear.weight.device.type == "cpu"


def _works(linear: nn.Linear) -> bool:
    """Whether the packed layer computes the same, for one row and for several."""
    try:
        packed = PackedLinear(linear)
        inputs = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        return all(_close(packed(x[None]), linear(x[None])) for x in (inputs[:1], inputs))
    except (RuntimeError, AttributeError, TypeError) as error:
        log.info("torch has no packed linear layers here: %s", error)
        return False


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    difference = (ours.float() - theirs.float()).norm()
    return bool(difference <= _TOLERANCE * theirs.float().norm())
