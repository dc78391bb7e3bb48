"""The native library, and attention in it: one call for each layer and step, with the GIL released.

Decides which library the CPU can run, compiles or finds it (`transfer/native/build.py`), and is the last gate before
raw addresses: block ids, shapes and dtypes are checked here, once per step. `find(pages)` is None where there is no
library or the pool is none of its kinds (float32 and bfloat16 on the CPU, head sizes a multiple of 8 up to 256);
attention then stays in torch, which is slower.

Each instruction set has a library of its own, so that none holds code that its CPU might not run; `WANTED` names one
(`LEVELS`), or `off`. That of tiles (AMX) is only used where it is named: it has never run on a CPU that has them.
`python -m diptych.engine.kernels` compiles ahead of the first start. Not responsible for the arithmetic (`native/`),
nor for what linear layers (`linears.py`) and whole layers (`fusion.py`) hand to it.
"""

import ctypes
import functools
import logging
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.engine.sequence import Piece
from diptych.transfer.native import build

log = logging.getLogger(__name__)

MAX_QUERIES = 8  # new tokens of a sequence; more of them are a piece of prompt, answered in another way
_FOLDER = Path(__file__).with_name("native")
_HEADERS = tuple(sorted(_FOLDER.glob("*.h")))
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_BF16 = (*_AVX512, "-mavx512bf16")
TILED = "amxbf16"
# Best first: name -> the compiler's flags. Without the `-m` each is the CPU's own name for what it must have.
LEVELS = {
    TILED: (*_BF16, "-mamx-tile", "-mamx-bf16"),
    "avx512bf16": _BF16,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "baseline": (),
}
WANTED = ""  # a level, "off", or the best that the CPU has and that was timed; tests and measurements set it
_SPELT = {"avx512bf16": "avx512_bf16", "amx-tile": "amx_tile", "amx-bf16": "amx_bf16"}
_ARCH_PRCTL, _REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18  # Linux, x86-64: Documentation/arch/x86/xstate.rst


def target(level: str) -> build.Target:
    """How the library of one level is built. Without OpenMP it runs on one thread."""
    source = _FOLDER / "kernels.cpp"
    return build.Target(
        f"kernels-{level}",
        source,
        _HEADERS,
        (*build.FLAGS, *LEVELS[level]),
        (("-fopenmp",), ("-Wno-unknown-pragmas",)),
    )


def levels_here() -> list[str]:
    """The levels this CPU can run, best first. Asks Linux for tiles, where the CPU has them."""
    return [level for level in LEVELS if _has(level) and (level != TILED or tiles_granted())]


def _has(level: str) -> bool:
    """Whether the CPU has a level's instructions."""
    names = [flag[2:] for flag in LEVELS[level] if flag.startswith("-m")]
    return _cpu_flags().issuperset(_SPELT.get(name, name) for name in names)


@functools.cache
def tiles_granted() -> bool:
    """Ask Linux to let this process use tiles (AMX), whose state is large; what it says then holds for all threads."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _REQ_XCOMP_PERM, _XTILEDATA) == 0:
        return True
    why = os.strerror(ctypes.get_errno())
    log.warning("Linux does not grant the tiles (AMX) of this CPU, so products are by vectors, and slower: %s", why)
    return False


@functools.cache
def _cpu_flags() -> set[str]:
    """What Linux says that the CPU has, and that it keeps in a thread's state."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return set()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def chosen_level() -> str | None:
    """The level to use: `WANTED`, otherwise the best that the CPU has, tiles apart; None for `off`.

    The level of tiles is the next one where Linux does not grant them. ValueError for what is no level of this CPU.
    """
    if WANTED == "off":
        return None
    if not WANTED or (WANTED == TILED and _has(TILED) and not tiles_granted()):
        return next(level for level in LEVELS if level != TILED and _has(level))
    if WANTED not in (here := levels_here()):
        raise ValueError(f"WANTED is {WANTED!r}; this CPU can run {', '.join(here)}, or off")
    return WANTED


@functools.cache
def library(level: str) -> ctypes.CDLL | None:
    """The compiled kernel of one level, or None (said once in the log) where it cannot be had."""
    try:
        lib = ctypes.CDLL(str(build.find_or_build(target(level))))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        lib.diptych_attend.argtypes = [pointer]
        lib.diptych_linear.argtypes = [pointer, number, pointer, number, pointer, number]
        lib.diptych_layer.argtypes = [pointer, pointer, pointer]
        for name in ("attend", "linear", "layer", "step_size", "layer_size"):
            getattr(lib, f"diptych_{name}").restype = number
    except (OSError, RuntimeError, AttributeError, build.BuildError) as error:  # RuntimeError: no home directory
        log.warning("the engine falls back to torch alone, which is several times slower at decoding: %s", error)
        return None
    if (lib.diptych_step_size(), lib.diptych_layer_size()) != (ctypes.sizeof(_Step), ctypes.sizeof(LayerArgs)):
        raise AssertionError("the structures of native/ and those of kernels.py differ")
    return lib


def best() -> ctypes.CDLL | None:
    """The library of the chosen level, if it can be had."""
    level = chosen_level()
    return None if level is None else library(level)


def multiplies_best(dtype: torch.dtype, level: str | None = None) -> bool:
    """Whether large products are the library's: of bfloat16, by vectors where the CPU has no tiles (AMX).

    Where it has them oneDNN's are known to be good and ours were never timed, so ours are used if they are asked for.
    """
    level = level or chosen_level()
    return dtype == torch.bfloat16 and (level == TILED or (level == "avx512bf16" and "amx_bf16" not in _cpu_flags()))


@dataclass(frozen=True, slots=True)
class Kernel:
    """The library for one pool's pages. May take the time of a compilation to make, once per machine."""

    pages: Tensor  # [block, layer, K/V, head, token, dim]
    level: str
    lib: ctypes.CDLL
    prompts: bool  # it answers pieces of prompt too; otherwise torch does

    def answers(self, piece: Piece) -> bool:
        """Whether a piece of a step is the library's."""
        return self.prompts or piece.count <= MAX_QUERIES


def find(pages: Tensor, level: str | None = None) -> Kernel | None:
    """The kernel for these pages, of a level or the best; None where torch must do it."""
    level = level or chosen_level()
    dim = pages.shape[-1]
    fits = pages.device.type == "cpu" and pages.dtype in (torch.float32, torch.bfloat16) and pages.is_contiguous()
    if level is None or not fits or dim % 8 or not 0 < dim <= 256:
        return None
    lib = library(level)
    return None if lib is None else Kernel(pages, level, lib, multiplies_best(pages.dtype, level))


class MatrixArgs(ctypes.Structure):
    """A linear layer, as native/linear.h has it."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("weight", "bias", "scales")],
        *[(name, ctypes.c_int64) for name in ("rows", "columns")],
    ]


class LayerArgs(ctypes.Structure):
    """A decoder layer, as native/layer.h has it."""

    _fields_ = [
        *[(name, MatrixArgs) for name in ("query", "key", "value", "out", "gate", "up", "down")],
        *[(name, ctypes.c_void_p) for name in ("norm_before", "norm_after", "norm_query", "norm_key", "sinks")],
        *[(name, ctypes.c_int64) for name in ("layer", "window", "activation")],
        *[(name, ctypes.c_float) for name in ("epsilon", "scale", "softcap")],
    ]


class CallArgs(ctypes.Structure):
    """What a decoder layer is given in one step, as native/layer.h has it."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "cosines", "sines", "y")],
        ("rotary", ctypes.c_int64),
    ]


class _Step(ctypes.Structure):
    """What one call is told; native/attention.h has the same, with what each means."""

    _fields_ = [
        *[("pages", ctypes.c_void_p)],
        *[(name, ctypes.c_int64) for name in ("is_bf16", "num_layers", "num_kv_heads", "block_size", "dim")],
        ("num_heads", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("key", "value")],
        *[(name, ctypes.c_int64) for name in ("key_head", "key_token", "value_head", "value_token", "num_tokens")],
        *[(name, ctypes.c_void_p) for name in ("slots", "query")],
        *[(name, ctypes.c_int64) for name in ("query_head", "query_token")],
        ("out", ctypes.c_void_p),
        ("num_sequences", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("first_token", "num_queries", "lengths", "first_block")],
        *[(name, ctypes.c_void_p) for name in ("tables", "sinks")],
        *[(name, ctypes.c_int64) for name in ("layer", "window", "num_threads")],
        *[(name, ctypes.c_float) for name in ("scale", "softcap")],
    ]


@dataclass(slots=True)
class NativeStep:
    """A step's native half, laid out once for all layers: every token's slot, and the pieces that the kernel answers.

    Its sequences are the first pieces of the step, in order.
    """

    kernel: Kernel
    arrays: list[NDArray[np.integer]] = field(default_factory=list)  # keeps alive what `args` points to
    args: _Step = field(default_factory=_Step)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> None:
        """Store keys and values [KV heads, tokens, dim], then fill the first rows of out [tokens, heads, dim].

        query: [heads, tokens, dim]. window: how many tokens a query sees, itself included; 0 for all. softcap: scores
        become cap * tanh(score / cap); 0 for none. sinks: float32 [heads], a logit each of which nothing is read.
        """
        query, key, value = (t if t.stride(2) == 1 else t.contiguous() for t in (query, key, value))
        self._check(layer, query, key, value, out, sinks)
        args = self.args
        args.layer, args.num_heads, args.window, args.scale, args.softcap = layer, len(query), window, scale, softcap
        args.query, args.key, args.value, args.out = (t.data_ptr() for t in (query, key, value, out))
        args.query_head, args.query_token, _ = query.stride()
        args.key_head, args.key_token, _ = key.stride()
        args.value_head, args.value_token, _ = value.stride()
        args.sinks = None if sinks is None else sinks.data_ptr()
        if self.kernel.lib.diptych_attend(ctypes.addressof(args)):
            raise MemoryError("attention: no memory for partial results")

    def _check(self, layer: int, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sinks: Tensor | None) -> None:
        args, dtype = self.args, self.kernel.pages.dtype
        heads, shape = query.shape[0], (args.num_kv_heads, args.num_tokens, args.dim)
        if key.shape != shape or value.shape != shape or query.shape[1:] != shape[1:] or heads % shape[0]:
            raise ValueError(f"attention over {shape}: query {query.shape}, key {key.shape}, value {value.shape}")
        if not query.dtype == key.dtype == value.dtype == out.dtype == dtype or not 0 <= layer < args.num_layers:
            raise ValueError(f"attention over pages of {dtype}: query {query.dtype}, layer {layer}")
        if out.shape != (shape[1], heads, shape[2]) or not out.is_contiguous():
            raise ValueError(f"attention writes [tokens, heads, dim], contiguous, not {out.shape}")
        if sinks is not None and (sinks.dtype != torch.float32 or sinks.shape != (heads,) or not sinks.is_contiguous()):
            raise ValueError(f"sinks must be float32 [{heads}]")


def lay_out(
    kernel: Kernel, pieces: Sequence[Piece], blocks: NDArray[np.int32], offsets: NDArray[np.int64]
) -> NativeStep:
    """Lay out a step. pieces: those the kernel answers, first in the step; blocks, offsets: of each of its tokens."""
    num_blocks, num_layers, _, num_heads, block_size, dim = kernel.pages.shape
    tables = np.concatenate([blocks, *(piece.blocks for piece in pieces)])
    if len(tables) and (int(tables.min()) < 0 or int(tables.max()) >= num_blocks):
        raise IndexError(f"block ids {tables.min()} to {tables.max()} are not all among {num_blocks} blocks")
    slots = (blocks.astype(np.int64) * (num_layers * 2 * num_heads * block_size) + offsets) * dim
    counts = [piece.count for piece in pieces]
    widths = [len(piece.blocks) for piece in pieces]
    if any(piece.end > width * block_size for piece, width in zip(pieces, widths, strict=True)):
        raise IndexError("a sequence has more tokens than its blocks hold")
    starts = [_starts(counts), counts, [piece.end for piece in pieces], _starts(widths, len(blocks))]
    about = np.array(starts, np.int64).reshape(4, -1)
    step = NativeStep(kernel, [tables, slots, about])
    args = step.args
    args.pages, args.is_bf16 = kernel.pages.data_ptr(), kernel.pages.dtype == torch.bfloat16
    args.num_layers, args.num_kv_heads, args.block_size, args.dim = num_layers, num_heads, block_size, dim
    args.slots, args.num_tokens, args.tables = slots.ctypes.data, len(slots), tables.ctypes.data
    args.num_sequences, args.num_threads = len(pieces), torch.get_num_threads()
    args.first_token, args.num_queries, args.lengths, args.first_block = (
        about.ctypes.data + row * about.strides[0] for row in range(4)
    )
    return step


def _starts(sizes: list[int], first: int = 0) -> list[int]:
    """Where each begins when they lie one after the other."""
    starts = []
    for size in sizes:
        starts.append(first)
        first += size
    return starts


def main() -> int:
    """`python -m diptych.engine.kernels [--in-place]`: build this CPU's library, or all of them next to the source.

    What this compiler cannot build is said; it fails where that is all.
    """
    in_place, num_built = "--in-place" in sys.argv[1:], 0
    for level in LEVELS if in_place else filter(None, [chosen_level()]):
        try:
            print((build.build_in_place if in_place else build.find_or_build)(target(level)))
            num_built += 1
        except (OSError, RuntimeError, build.BuildError) as error:
            print(f"could not build the native kernels for {level}: {error}", file=sys.stderr)
    return 0 if num_built else 1


if __name__ == "__main__":
    sys.exit(main())
