"""Linear layers that read their weights at the speed of memory where a step has few rows: decoding, above all.

The native kernel takes the weights as they lie ([out, in]; nothing is packed, shared weights stay shared), so it serves
float32 and bfloat16, and leaves many rows to torch. Where there is no native library, `packing.py` does what torch can.
Not responsible for the arithmetic (`native/linear.h`), nor for which layers share an input (`fusion.py`).
"""

import ctypes
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diptych.engine import kernels

MAX_ROWS = 64  # of input; with more of them torch's product is faster, where it has tiles (AMX) or computes in float32
COLUMNS = 32  # the width of an input is a multiple of this


class StreamedLinear(nn.Module):
    """What `nn.Linear` computes, natively for few rows; the same parameters under the same names."""

    def __init__(self, linear: nn.Linear, lib: ctypes.CDLL) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._lib = lib
        self._most_rows = most_rows(linear.weight.dtype)
        self._is_bf16 = linear.weight.dtype == torch.bfloat16
        self.args = matrix(linear)
        self._address = ctypes.addressof(self.args)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.numel() // self.in_features
        if not 0 < rows <= self._most_rows or x.dtype != self.weight.dtype or not x.is_contiguous():
            return nn.functional.linear(x, self.weight, self.bias)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        threads = torch.get_num_threads()
        if self._lib.diptych_linear(self._address, self._is_bf16, x.data_ptr(), rows, out.data_ptr(), threads):
            raise MemoryError("linear layer: no memory for its input")
        return out

    def extra_repr(self) -> str:
        """As nn.Linear shows itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def most_rows(dtype: torch.dtype) -> int:
    """How many rows of input are computed natively."""
    return sys.maxsize if kernels.multiplies_best(dtype) else MAX_ROWS


def matrix(linear: nn.Linear | StreamedLinear) -> kernels.MatrixArgs:
    """A layer as the library sees it; whoever holds this holds the layer."""
    bias = None if linear.bias is None else linear.bias.data_ptr()
    return kernels.MatrixArgs(linear.weight.data_ptr(), bias, linear.out_features, linear.in_features)


def stream_linears(module: nn.Module, lib: ctypes.CDLL) -> int:
    """Replace the linear layers of a model on the CPU, in place; returns how many."""
    streamed: dict[nn.Linear, StreamedLinear] = {}  # a layer used in two places stays one
    for parent, name, linear in list(places(module)):
        if _fits(linear):
            if linear not in streamed:
                streamed[linear] = StreamedLinear(linear, lib)
            setattr(parent, name, streamed[linear])
    return len(streamed)


def places(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
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
