"""The waiting side of a read: a thread per peer that moves bytes, and futures on the event loop that say how it went.

`ThreadedPeer` and `ThreadedRead` serve every transport, whether the bytes are copied from a mapping (`local.py`,
`shm.py`) or received from a socket (`tcp.py`). A transfer has two ends: its outcome, known as soon as it succeeded,
failed, was cancelled, ran out of time or lost its peer; and `settled`, when the thread has left the native call that
writes into its blocks, or never entered it.

Not responsible for how the bytes come, nor for noticing that the peer is gone: transports call `lose`.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future as Job
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from diptych.errors import DiptychError, PeerLost, TransferError
from diptych.transfer import native
from diptych.transfer.layout import Layout
from diptych.transfer.seam import Landed, Lane, Plan, Stats

log = logging.getLogger(__name__)


class Work(Protocol):
    """A checked read. `run` blocks the thread that it is lent; a flag given before makes it stop soon, and raise."""

    def run(self, landed: Landed | None = None) -> Stats:
        """Move and verify the bytes; raises a TransferError. `landed` hears of each part as soon as it is here."""


class ThreadedRead:
    """One read. Made by `ThreadedPeer.read`; all methods belong to its event loop.

    `interrupt` is called whenever `flag` was set under work that may be waiting, so that it looks.
    """

    def __init__(self, name: str, interrupt: Callable[[], None]) -> None:
        self._name = name
        self._interrupt = interrupt
        self._loop = asyncio.get_running_loop()
        self.settled: asyncio.Future[None] = self._loop.create_future()
        self.left: asyncio.Future[None] = self._loop.create_future()  # as settled, but no user can cancel it
        self._decided: asyncio.Future[None] = self._loop.create_future()
        self._outcome: Stats | DiptychError | None = None
        self.flag: native.Flag = np.zeros(1, dtype=np.int32)  # set: whoever moves bytes for this read stops
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

    def start(self, work: Work, thread: ThreadPoolExecutor, deadline_s: float, landed: Landed | None = None) -> None:
        """Queue the work; from here on the deadline runs."""
        if deadline_s <= 0:
            self.fail(self._too_late(deadline_s))
            return
        self._timer = self._loop.call_later(deadline_s, lambda: self.fail(self._too_late(deadline_s)))
        self._job = thread.submit(self._work, work, landed)

    def fail(self, error: DiptychError) -> None:
        """Decide for failure, unless decided already, and stop the work at its next block."""
        self._decide(error)
        if not self.flag[0] and not self.left.done():
            self.flag[0] = 1
            self._interrupt()
        if self._job is None or self._job.cancel():  # nothing runs, and now nothing will
            self._settle()

    def _too_late(self, deadline_s: float) -> TransferError:
        return TransferError(f"deadline of {deadline_s:g} s passed while reading from {self._name}")

    def _work(self, work: Work, landed: Landed | None) -> None:
        """In the thread. However it ends, the loop hears of it: a read that never settles leaks blocks."""
        outcome: Stats | DiptychError
        try:
            outcome = work.run(landed)
        except DiptychError as error:
            outcome = error
        except Exception as error:  # e.g. MemoryError: still a failed read, not a silent one
            log.exception("read from %s failed", self._name)
            outcome = TransferError(f"read from {self._name} failed: {error!r}")
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


class ThreadedPeer:
    """A source of blocks, and a thread that reads from it. Reads of one peer go in order.

    `prepare` checks a plan and makes the work of it. `release` is called once, when the peer is lost or closed: it
    drops the mapping and the connection. `pace`, where it is set, makes what a read's `landed` is (`emulated.py`).
    """

    def __init__(
        self,
        name: str,
        worker: str,
        lane: Lane,
        layout: Layout,
        prepare: Callable[[Plan, native.Flag], Work],
        release: Callable[[], None],
        interrupt: Callable[[], None] = lambda: None,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        self.name, self.worker, self.lane, self.layout = name, worker, lane, layout
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._prepare, self._interrupt = prepare, interrupt
        self._release: Callable[[], None] | None = release
        self._gone: str | None = None  # why no new read is taken
        self._under_way: set[ThreadedRead] = set()
        self._thread = thread or new_thread(name)
        self.pace: Callable[[native.Flag], Landed] | None = None

    def read(self, plan: Plan, deadline_s: float) -> ThreadedRead:
        """Start a read. Never raises: a bad plan or a lost peer fails the transfer, which is settled at once."""
        transfer = ThreadedRead(self.name, self._interrupt)
        try:
            if self._gone is not None:
                raise PeerLost(f"{self.name} is gone: {self._gone}")
            work = self._prepare(plan, transfer.flag)
        except DiptychError as error:
            transfer.fail(error)
            return transfer
        self._under_way.add(transfer)
        transfer.left.add_done_callback(lambda _: self._settled(transfer))
        transfer.start(work, self._thread, deadline_s, self.pace(transfer.flag) if self.pace else None)
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
        """Drop mapping and connection; reads under way fail. Returns when the thread touches nothing any more."""
        self.lose("closed on this side")
        await settle([self])

    @property
    def under_way(self) -> frozenset[ThreadedRead]:
        """Reads that have not settled."""
        return frozenset(self._under_way)

    def _say_lost(self, reason: str) -> None:
        if self._gone is None:
            self._gone = reason
        if not self.lost.done():
            self.lost.set_result(reason)

    def _settled(self, transfer: ThreadedRead) -> None:
        self._under_way.discard(transfer)
        if self._gone is not None and not self._under_way:
            self._let_go()

    def _let_go(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()
            self._thread.shutdown(wait=False)


def new_thread(name: str) -> ThreadPoolExecutor:
    """The one thread of a peer; it starts with the first read."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"kv-{name}")


async def settle(peers: Iterable[ThreadedPeer], timeout_s: float | None = None) -> None:
    """Wait until no read from these peers can land a byte any more, at most `timeout_s`.

    Without a limit only for reads that were told to stop: they do at their next block.
    """
    waiting = [transfer.left for peer in peers for transfer in peer.under_way]
    if waiting:
        await asyncio.wait(waiting, timeout=timeout_s)  # wait, not wait_for or gather: those cancel what they wait for
