"""Memory for the blocks of one Layout, in a form another process can be given: a sealed memfd, mapped.

The owner maps it read-write; a peer that was sent the descriptor maps it read-only, and the seals make sure that it
stays so: the file can neither shrink under a reader (which would be a SIGBUS) nor be mapped for writing again. A
mapping outlives the process that made it, so a read from a killed peer is at worst stale, never a crash.

Not responsible for which block is whose (policy), for handing the descriptor over (`shm.py`), or for dtypes.
"""

import contextlib
import fcntl
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from diptych.errors import ConfigError, ProtocolError
from diptych.transfer.layout import Layout

_PAGE = mmap.PAGESIZE
_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; the name is not in Python 3.11's fcntl
MAX_BLOCKS = 2**31 - 1  # block ids are int32


class Pool:
    """`num_blocks` blocks of `layout`; `view` is uint8 [num_blocks, block_bytes], read-only where attached.

    `Pool(layout, n)` creates the memory and touches all of it, so that no later copy pays for page faults: the whole
    pool is resident from the start. `fd` is the memfd (-1 for an attached pool). The creator closes it.
    """

    def __init__(self, layout: Layout, num_blocks: int):
        _check_size(layout, num_blocks)
        size = num_blocks * layout.block_bytes
        self.fd = os.memfd_create("diptych-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            self._set_up(layout, num_blocks, mmap.mmap(self.fd, size, mmap.MAP_SHARED))
            self._make_resident()
            _seal(self.fd)
        except BaseException:
            os.close(self.fd)
            raise

    @classmethod
    def attach(cls, fd: int, layout: Layout, num_blocks: int) -> "Pool":
        """Map a peer's pool read-only. `fd` stays the caller's to close, at once if it likes.

        Raises ProtocolError unless the file is what the peer said: neither its size nor its seals are taken on trust.
        """
        _check_size(layout, num_blocks)
        size = num_blocks * layout.block_bytes
        actual = os.fstat(fd).st_size
        if actual != size:
            raise ProtocolError(f"the peer's pool has {actual} bytes, not {num_blocks} x {layout.block_bytes} = {size}")
        if not _seals(fd) & fcntl.F_SEAL_SHRINK:
            raise ProtocolError("the peer's pool is not a memfd sealed against shrinking")
        pool = cls.__new__(cls)
        pool.fd = -1
        pool._set_up(layout, num_blocks, mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ))
        return pool

    def _set_up(self, layout: Layout, num_blocks: int, mapping: mmap.mmap) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self._mapping: mmap.mmap | None = mapping
        flat = np.frombuffer(mapping, dtype=np.uint8)
        self._view: NDArray[np.uint8] | None = flat.reshape(num_blocks, layout.block_bytes)

    def _make_resident(self) -> None:
        assert self._mapping is not None
        with contextlib.suppress(OSError):  # huge pages are a kindness of the kernel, not a need
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.view.reshape(-1)[::_PAGE] = 0

    @property
    def view(self) -> NDArray[np.uint8]:
        """uint8 [num_blocks, block_bytes]. Raises ProtocolError once the pool is closed."""
        if self._view is None:
            raise ProtocolError("the pool is closed")
        return self._view

    @property
    def address(self) -> int:
        """Where block 0 lies in this process."""
        return int(self.view.ctypes.data)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._view is None

    def close(self) -> None:
        """Give the memory up. Idempotent. Where a copy or a tensor still looks at it, it goes with the last of them."""
        mapping, self._mapping, self._view = self._mapping, None, None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if mapping is not None:
            with contextlib.suppress(BufferError):  # unmapping under a reader would be a crash
                mapping.close()


def _check_size(layout: Layout, num_blocks: int) -> None:
    if not 1 <= num_blocks <= MAX_BLOCKS or num_blocks * layout.block_bytes >= 1 << 62:
        raise ConfigError(f"a pool of {num_blocks} blocks of {layout.block_bytes} bytes cannot be made")


def _seal(fd: int) -> None:
    """Forbid resizing and, where the kernel can, any further writable mapping."""
    fixed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fixed | _SEAL_FUTURE_WRITE)
    except OSError:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fixed)


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # not a memfd at all
        return 0
