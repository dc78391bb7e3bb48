"""The reader's side of a KV stream over TCP: asks for blocks by index, and lands the replies where a plan says.

A plan is cut into batches, each one request and one reply. A few are asked for ahead, those of the next plans too, so
that the wire does not idle for a round trip between two reads. All socket work is done by the peer's one thread: plans
are `Fetch`es that it runs in order (`reading.py`), and between them it drains.

An abort needs no new connection. The thread waits for the socket and for a wake-up call together, so it leaves a
fetch's blocks within one `recvmsg`, whatever the peer does: then the fetch is over, and settled. What had been asked
for it, at most `WINDOW` batches, is received later, into scratch memory. If the peer is stuck, that waits, and so
do the reads behind it, until their deadlines; none of them can be written into.

Not responsible for noticing a peer that goes while nothing is read (`tcp.py`), nor for who it is (`introduction.py`).
"""

import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diptych.errors import PeerLost, ProtocolError, TransferError
from diptych.transfer import copying, frames, native
from diptych.transfer.codec import STAGING_BYTES, Choice, Chooser, Staging, rows_of
from diptych.transfer.copying import Moves
from diptych.transfer.native import int8, sockets
from diptych.transfer.pool import Pool
from diptych.transfer.seam import Landed, Plan, Stats

WINDOW = 2  # batches asked for and not yet here
BATCH_BYTES = (
    STAGING_BYTES  # a request costs tens of microseconds on both sides; an abort leaves WINDOW times this to drain
)
_SCRATCH_BYTES = 256 << 10

Lost = Callable[[str], None]


class Fetch:
    """One plan, as work for the stream's thread."""

    def __init__(self, stream: "Stream", target: Pool, moves: Moves, plan: Plan, flag: native.Flag, choice: Choice):
        self._stream, self._target, self._plan = stream, target, plan
        self.moves, self.flag, self.choice = moves, flag, choice
        self.sums = moves.new_sums()
        self.num_left = 0  # batches that have not landed
        self.wire_bytes = 0
        self.wire_s = self.codec_s = 0.0

    def run(self, landed: Landed | None = None) -> Stats:
        """Receive and verify; raises PeerLost, ProtocolError, TransferError (cancelled, checksum).

        `Stats.elapsed_s` begins when this read's turn comes; what was asked for ahead may be here by then.
        """
        started = time.perf_counter()
        self._stream.land(self, landed)
        self.moves.verify(self.sums)
        elapsed_s = time.perf_counter() - started
        return Stats(self.moves.num_bytes, elapsed_s, self.choice.codec, self.wire_bytes, self.choice.why)

    def batches(self, staging: Staging) -> Iterator["Batch"]:
        """The plan in parts of bounded size."""
        moves, n, encoded = self.moves, len(self.moves.target_ids), self.choice.codec == "int8"
        step = min(max(1, BATCH_BYTES // moves.block_bytes), frames.MAX_BLOCKS)
        for first in range(0, n, step):
            part = slice(first, min(first + step, n))
            count = part.stop - first
            if encoded:
                landing = sockets.batch(staging.take(count), np.arange(count, dtype=np.int32), None)
            else:
                landing = sockets.batch(self._target.view, moves.target_ids[part], moves.pieces)
            sums = None if self.sums is None else self.sums[part]
            self.num_left += 1
            ids = moves.source_ids[part], moves.target_ids[part]
            yield Batch(self, landing, *ids, sums, self._plan.layers, self._plan.heads, self._plan.permit)

    def decode(self, batch: "Batch", shape: int8.Rows) -> None:
        """Put blocks that came encoded where they belong; raises TransferError for damaged ones, and if cancelled."""
        began = time.perf_counter()
        where = batch.landing.blocks, self._target.view, batch.target_ids
        done = int8.decode(*where, shape, batch.sums, self.flag)
        if done < len(batch.target_ids):
            cancelled = "cancelled before decoding" if self.flag[0] else "checksum of what travelled differs for"
            raise TransferError(f"{cancelled} the peer's block {batch.source_ids[done]}")
        self.codec_s += time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class Batch:
    """One request: where its reply lands, and what it asks for."""

    fetch: Fetch
    landing: sockets.Batch
    source_ids: native.Ids
    target_ids: native.Ids
    sums: NDArray[np.uint64] | None
    layers: frames.Range
    heads: frames.Range
    permit: bytes

    def request(self, number: int) -> bytes:
        """As bytes."""
        codec = self.fetch.choice.codec
        asked = frames.Request(number, len(self.source_ids), self.layers, self.heads, codec, self.permit)
        return frames.encode_request(asked, self.source_ids.astype("<i4").tobytes())


class Stream:
    """A connection for reading, and what is due on it.

    `prepare`, `interrupt` and `close` belong to the event loop, everything else to the thread; `lost` is called on
    the thread when the stream cannot go on.
    """

    def __init__(
        self, sock: socket.socket, num_blocks: int, target: Pool, thread: ThreadPoolExecutor, name: str, lost: Lost
    ):
        self._sock, self._num_blocks, self._target, self._thread = sock, num_blocks, target, thread
        self._name, self._lost = name, lost
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False
        self._stop: native.Flag = np.zeros(1, dtype=np.int32)
        self._broken = ""  # why no byte of the stream can be understood any more
        self._planned: deque[Batch] = deque()  # in the order of the reads
        self._asked: deque[tuple[int, Batch]] = deque()  # in the order of the replies, with their numbers
        self._number = 0
        self._outgoing = b""
        self._head = sockets.batch(np.zeros((1, frames.REPLY_BYTES), dtype=np.uint8), _FIRST, None)
        self._scratch: native.Blocks | None = None
        self._staging = Staging(rows_of(target.layout))
        self.chooser = Chooser(self._staging.shape)
        self._began = 0.0  # when the first reply's bytes began to come
        self._at = -frames.REPLY_BYTES  # bytes of the first reply that are here; below 0: of its head

    # --- on the event loop ----------------------------------------------------------------------------------------

    def prepare(self, plan: Plan, flag: native.Flag) -> Fetch:
        """Check a plan and queue its requests. Raises what `copying.check` does."""
        moves = copying.check(self._num_blocks, self._target, plan)
        choice = self.chooser.choose(plan.codec, moves.num_bytes, moves.pieces is None)
        fetch = Fetch(self, self._target, moves, plan, flag, choice)
        self._planned.extend(fetch.batches(self._staging))
        self._nudge()
        return fetch

    def interrupt(self) -> None:
        """A flag was set: whoever waits for the socket should look at it, and somebody receive what is not wanted."""
        if not self._closed:
            self._nudge()
            self._thread.submit(self._drain)

    def close(self) -> None:
        """Hang up once the thread is out of the socket, which is soon. Idempotent."""
        if not self._closed:
            self._stop[0] = 1
            self._nudge()
            self._closed = True
            self._thread.submit(self._hang_up)

    def _nudge(self) -> None:
        if not self._closed:  # afterwards the descriptor may be somebody else's
            os.eventfd_write(self._wake, 1)

    # --- in the thread --------------------------------------------------------------------------------------------

    def land(self, fetch: Fetch, landed: Landed | None) -> None:
        """Receive until all of a fetch is here. Raises PeerLost, ProtocolError, TransferError (cancelled, refused)."""
        try:
            with self._breaking():
                while fetch.num_left:
                    if fetch.flag[0]:
                        raise TransferError(f"cancelled with {fetch.num_left} requests to go")
                    self._ask()
                    self._advance(fetch, fetch.flag, landed)
        except TransferError:
            fetch.flag[0] = 1  # what is left of it is not wanted, nor asked for
            with contextlib.suppress(RuntimeError):  # the thread takes no more work: the stream is closed
                self._thread.submit(self._drain)
            raise
        if fetch.wire_s:
            self.chooser.crossed(fetch.wire_bytes, fetch.wire_s)
        if fetch.codec_s:
            self.chooser.coded(fetch.moves.num_bytes, fetch.codec_s)

    def _drain(self) -> None:
        """Receive what nobody wants any more, so that the source can go on."""
        with contextlib.suppress(TransferError), self._breaking():
            while self._asked and self._asked[0][1].fetch.flag[0] and not self._stop[0]:
                self._ask()
                self._advance(None, self._stop)

    def _hang_up(self) -> None:
        self._sock.close()
        os.close(self._wake)
        self._planned.clear()

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """Whatever goes wrong in the middle of a reply, except that somebody gave up, is the end of the stream."""
        if self._broken:
            raise PeerLost(f"{self._name} is gone: {self._broken}")
        try:
            yield
        except OSError as error:
            self._break(f"the connection broke: {error}")
            raise PeerLost(f"{self._name} is gone: {self._broken}") from error
        except TransferError as error:
            if isinstance(error, ProtocolError):
                self._break(str(error))
            raise
        except Exception as error:
            self._break(f"reading failed: {error!r}")
            raise

    def _break(self, why: str) -> None:
        self._broken = why
        self._lost(why)

    def _ask(self) -> None:
        """Send requests until enough are on their way. Anybody's nudge ends here: its flag is looked at next."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._planned and len(self._asked) < WINDOW:
            batch = self._planned.popleft()
            if not batch.fetch.flag[0]:
                self._number += 1
                self._asked.append((self._number, batch))
                self._outgoing += batch.request(self._number)
        if self._outgoing:
            with contextlib.suppress(BlockingIOError):
                self._outgoing = self._outgoing[self._sock.send(self._outgoing, socket.MSG_NOSIGNAL) :]

    def _advance(self, fetch: Fetch | None, flag: native.Flag, landed: Landed | None = None) -> None:
        """Receive some of the reply that is due: into its blocks if it is this fetch's, else into scratch memory."""
        if self._outgoing:  # the peer takes no requests now: wait for either direction
            sockets.readable(self._sock, self._wake, writing=True)
        if not self._asked:
            return
        number, batch = self._asked[0]
        if self._at < 0:
            here = self._at + frames.REPLY_BYTES
            self._at = sockets.receive(self._sock, self._wake, self._head, here, None, flag) - frames.REPLY_BYTES
            if self._at < 0:
                return
            head = self._head.blocks.tobytes()
            encode_s = frames.check_reply(head, number, len(batch.source_ids), batch.landing.num_bytes)
            if encode_s is None:
                self._next(batch)
                if batch.fetch is fetch:
                    raise copying.refusal(self._name)
                return
            batch.fetch.codec_s += encode_s
            self._began = time.perf_counter()
        if batch.fetch is fetch:
            sums = batch.sums if batch.fetch.choice.codec == "raw" else None
            self._at = sockets.receive(self._sock, self._wake, batch.landing, self._at, sums, flag)
        else:
            self._at += self._discard(batch.landing.num_bytes - self._at, flag)
        if self._at == batch.landing.num_bytes:
            self._next(batch)
            if batch.fetch is fetch:
                self._landed(fetch, batch, landed)

    def _next(self, batch: Batch) -> None:
        """That batch is through; the next reply is due."""
        self._asked.popleft()
        self._at = -frames.REPLY_BYTES
        batch.fetch.num_left -= 1

    def _landed(self, fetch: Fetch, batch: Batch, landed: Landed | None) -> None:
        """All of a reply is here."""
        num_bytes = batch.landing.num_bytes
        if landed is not None:
            landed(num_bytes, self._began)
        fetch.wire_bytes += num_bytes
        fetch.wire_s += time.perf_counter() - self._began
        if fetch.choice.codec == "int8":
            assert self._staging.shape is not None
            fetch.decode(batch, self._staging.shape)

    def _discard(self, limit: int, flag: native.Flag) -> int:
        """Receive at most `limit` unwanted bytes; returns how many came."""
        if self._scratch is None:
            self._scratch = np.zeros((1, _SCRATCH_BYTES), dtype=np.uint8)
        nowhere = sockets.batch(self._scratch, _FIRST, ((0, min(limit, _SCRATCH_BYTES)),))
        return sockets.receive(self._sock, self._wake, nowhere, 0, None, flag)


_FIRST = np.zeros(1, dtype=np.int32)
