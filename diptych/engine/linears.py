"""Linear layers that read their weights at the speed of memory where a step has few rows: decoding, above all.

The native kernel takes the weights as they lie ([out, in]; nothing is packed, shared weights stay shared), so it serves
float32 and bfloat16, and leaves many rows to torch. With `int8` weights are kept in a byte each and a factor for each
row (its largest is 127), which halves what is read and held; inputs and sums stay as they were. Each shape is tried on
random input before it is used. Where there is no native library, `packing.py` does what torch can. Not responsible for
the arithmetic (`native/multiply.h`), nor for which layers share an input (`fusion.py`).
"""

import ctypes
import logging
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diptych.engine import kernels

log = logging.getLogger(__name__)

MAX_ROWS = 64  # of input; with more of them torch's product is faster, where it has tiles (AMX) or computes in float32
_TRIED = (1, 7, 17)  # rows of input: the last are more than vectors take where there are tiles (native/tiled.h)
_TOLERANCE = 0.02  # relative: bfloat16 carries 8 bits, and sums are taken in different orders
COLUMNS = 32  # the width of an input is a multiple of this


class StreamedLinear(nn.Module):
    """What `nn.Linear` computes, natively for few rows; its parameters under the same names, `scales` beside int8."""

    def __init__(self, linear: nn.Linear, lib: ctypes.CDLL, int8: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.dtype = linear.weight.dtype
        self.register_buffer("scales", None)
        if int8:
            weight, self.scales = quantized(linear.weight)
            self.weight = nn.Parameter(weight, requires_grad=False)
        self._lib = lib
        self._most_rows = most_rows(self.dtype)
        self.args = kernels.MatrixArgs(
            *(None if part is None else part.data_ptr() for part in (self.weight, self.bias, self.scales)),
            self.out_features,
            self.in_features,
        )
        self._address = ctypes.addressof(self.args)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.numel() // self.in_features
        if not 0 < rows <= self._most_rows or x.dtype != self.dtype or not x.is_contiguous():
            return nn.functional.linear(x, self.whole_weight(), self.bias)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        is_bf16, threads = self.dtype == torch.bfloat16, torch.get_num_threads()
        if self._lib.diptych_linear(self._address, is_bf16, x.data_ptr(), rows, out.data_ptr(), threads):
            raise MemoryError("linear layer: no memory for its input")
        return out

    def whole_weight(self) -> Tensor:
        """The weight [out, in] as the model computes; made anew of int8."""
        if self.scales is None:
            return self.weight
        return (self.weight * self.scales[:, None]).to(self.dtype)

    def extra_repr(self) -> str:
        """As nn.Linear shows itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as int8 and float32 factors [out]: to nearest, each row by its largest element."""
    wide = weight.detach().float()
    scales = wide.abs().amax(1).clamp_min(1e-20) / 127
    return (wide / scales[:, None]).round().to(torch.int8), scales


def most_rows(dtype: torch.dtype) -> int:
    """How many rows of input are computed natively."""
    return sys.maxsize if kernels.multiplies_best(dtype) else MAX_ROWS


def stream_linears(module: nn.Module, lib: ctypes.CDLL, int8: bool = False) -> int:
    """Replace the linear layers of a model on the CPU, in place; returns how many.

    A weight that something else holds as well (an embedding that shares it) is not turned into int8.
    """
    holders = [id(p) for part in module.modules() for p in part._parameters.values()]
    tried: dict[tuple[int, int, bool], bool] = {}
    streamed: dict[nn.Linear, StreamedLinear] = {}  # a layer used in two places stays one
    for parent, name, linear in list(_places(module)):
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        if shape not in tried:
            tried[shape] = _fits(linear) and _works(StreamedLinear(linear, lib, int8))
        if tried[shape]:
            if linear not in streamed:
                alone = holders.count(id(linear.weight)) == 1
                streamed[linear] = StreamedLinear(linear, lib, int8 and alone)
            setattr(parent, name, streamed[linear])
    if not all(tried.values()):
        log.info("%d of %d shapes of linear layers stay torch's", list(tried.values()).count(False), len(tried))
    return len(streamed)


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Where layers that can be replaced hang: (parent, attribute, layer).

    Not subclasses: they may compute something else; nor layers with hooks, which may expect what they hang on.
    """
    for parent in module.modules():
        for name, child in parent._modules.items():  # named_children() would name a layer used twice only once
            if type(child) is nn.Linear and not child._forward_hooks and not child._forward_pre_hooks:
                yield parent, name, child


def _fits(linear: nn.Linear) -> bool:
    weight = linear.weight
    known = weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu"
    return known and weight.is_contiguous() and linear.in_features % COLUMNS == 0


def _works(layer: StreamedLinear) -> bool:
    """Whether a layer computes what torch does with its weight, for one row and for several."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(_TRIED[-1], layer.in_features, generator=random).to(layer.dtype)
    wanted = nn.functional.linear(x, layer.whole_weight(), layer.bias).float()
    return all((layer(x[:num]).float() - wanted[:num]).norm() <= _TOLERANCE * wanted[:num].norm() for num in _TRIED)
