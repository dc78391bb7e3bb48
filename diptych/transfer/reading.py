"""The waiting side of a read: a thread per peer that copies, and futures on the event loop that say how it went.

`MappedPeer` and `MappedTransfer` serve every transport whose source pool is mapped into this process (`local.py`,
`shm.py`). A transfer has two ends: its outcome, known as soon as it succeeded, failed, was cancelled, ran out of time
or lost its peer; and `settled`, when the copy thread has left the native call, or never entered it.

Not responsible for how the memory came here, nor for noticing that the peer is gone: transports call `lose`.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future as Job
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from diptych.errors import DiptychError, PeerLost, TransferError
from diptych.transfer.copying import Copy, prepare
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool
from diptych.transfer.seam import Plan, Stats

log = logging.getLogger(__name__)


class MappedTransfer:
    """One read. Made by `MappedPeer.read`; all methods belong to its event loop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.get_running_loop()
        self.settled: asyncio.Future[None] = self._loop.create_future()
        self.left: asyncio.Future[None] = self._loop.create_future()  # as settled, but no user can cancel it
        self._decided: asyncio.Future[None] = self._loop.create_future()
        self._outcome: Stats | DiptychError | None = None
        self._flag = np.zeros(1, dtype=np.int32)
        self._job: Job[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def done(self) -> Stats:
        """Wait for the bytes, verified; raises PeerLost, ProtocolError, TransferError (late, checksum, cancelled)."""
        await asyncio.shield(self._decided)
        if isinstance(self._outcome, Stats):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome.with_traceback(None)

    def cancel(self) -> None:
        """Ask to stop. The outcome is decided at once; the blocks are free again only when `settled`."""
        self.fail(TransferError(f"read from {self._name} cancelled"))

    def start(self, copy: Copy, thread: ThreadPoolExecutor, deadline_s: float) -> None:
        """Queue the copy; from here on the deadline runs."""
        if deadline_s <= 0:
            self.fail(self._too_late(deadline_s))
            return
        self._timer = self._loop.call_later(deadline_s, lambda: self.fail(self._too_late(deadline_s)))
        self._job = thread.submit(self._work, copy)

    def fail(self, error: DiptychError) -> None:
        """Decide for failure, unless decided already, and stop the copy at its next block."""
        self._decide(error)
        self._flag[0] = 1
        if self._job is None or self._job.cancel():  # nothing runs, and now nothing will
            self._settle()

    def _too_late(self, deadline_s: float) -> TransferError:
        return TransferError(f"deadline of {deadline_s:g} s passed while reading from {self._name}")

    def _work(self, copy: Copy) -> None:
        """In the copy thread. However it ends, the loop hears of it: a read that never settles leaks blocks."""
        outcome: Stats | DiptychError
        try:
            outcome = copy.run(self._flag)
        except DiptychError as error:
            outcome = error
        except Exception as error:  # e.g. MemoryError: still a failed read, not a silent one
            log.exception("copy from %s failed", self._name)
            outcome = TransferError(f"copy from {self._name} failed: {error!r}")
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(self._returned, outcome)

    def _returned(self, outcome: Stats | DiptychError) -> None:
        self._settle()
        self._decide(outcome)

    def _decide(self, outcome: Stats | DiptychError) -> None:
        if not isinstance(outcome, Stats):
            # Its frames would keep the peer's memory mapped for as long as the error lives.
            outcome.with_traceback(None)
        if self._outcome is None:
            self._outcome = outcome
            if not self._decided.done():
                self._decided.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _settle(self) -> None:
        for future in (self.left, self.settled):
            if not future.done():
                future.set_result(None)


class MappedPeer:
    """A source pool that is mapped here, and a thread that copies from it. Reads of one peer go in order.

    `release` is called once, when the peer is lost or closed: it drops the mapping and the connection.
    """

    def __init__(self, name: str, source: Pool, target: Pool, release: Callable[[], None]) -> None:
        self.name = name
        self.layout: Layout = source.layout
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._source, self._target = source, target
        self._release: Callable[[], None] | None = release
        self._gone: str | None = None  # why no new read is taken
        self._under_way: set[MappedTransfer] = set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"kv-{name}")

    def read(self, plan: Plan, deadline_s: float) -> MappedTransfer:
        """Start a read. Never raises: a bad plan or a lost peer fails the transfer, which is settled at once."""
        transfer = MappedTransfer(self.name)
        try:
            if self._gone is not None:
                raise PeerLost(f"{self.name} is gone: {self._gone}")
            copy = prepare(self._source, self._target, plan)
        except DiptychError as error:
            transfer.fail(error)
            return transfer
        self._under_way.add(transfer)
        transfer.left.add_done_callback(lambda _: self._settled(transfer))
        transfer.start(copy, self._thread, deadline_s)
        return transfer

    def leave(self, reason: str) -> None:
        """The peer is going, politely: no new reads, those under way may finish; then the mapping goes."""
        self._say_lost(reason)
        if not self._under_way:
            self._let_go()

    def lose(self, reason: str) -> None:
        """The peer is gone: reads under way fail now, settle soon, and the mapping goes with the last of them."""
        self._say_lost(reason)
        for transfer in tuple(self._under_way):
            transfer.fail(PeerLost(f"{self.name} is gone: {reason}"))
        self._let_go()

    async def close(self) -> None:
        """Drop mapping and connection; reads under way fail. Returns when the copy thread touches nothing any more."""
        self.lose("closed on this side")
        await settle([self])

    @property
    def under_way(self) -> frozenset[MappedTransfer]:
        """Reads that have not settled."""
        return frozenset(self._under_way)

    def _say_lost(self, reason: str) -> None:
        if self._gone is None:
            self._gone = reason
        if not self.lost.done():
            self.lost.set_result(reason)

    def _settled(self, transfer: MappedTransfer) -> None:
        self._under_way.discard(transfer)
        if self._gone is not None and not self._under_way:
            self._let_go()

    def _let_go(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()
            self._thread.shutdown(wait=False)


async def settle(peers: Iterable[MappedPeer], timeout_s: float | None = None) -> None:
    """Wait until no read from these peers can land a byte any more, at most `timeout_s`.

    Without a limit only for reads that were told to stop: they do at their next block.
    """
    waiting = [transfer.left for peer in peers for transfer in peer.under_way]
    if waiting:
        await asyncio.wait(waiting, timeout=timeout_s)  # wait, not wait_for or gather: those cancel what they wait for
