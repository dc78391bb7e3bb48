"""Real transports between the pools of one process: what `LocalCluster` reads crosses shared memory, or a socket."""

import asyncio
import tempfile
from types import TracebackType
from typing import Self

from diptych.transfer.pool import Pool
from diptych.transfer.reach import Transports
from diptych.transfer.reading import ThreadedPeer
from diptych.transfer.seam import Lane, Plan, Readable, Stats


class Lanes:
    """Connects pools when they are first read from; `read` is for `LocalCluster`. Close it before the pools."""

    def __init__(self, lane: Lane):
        self.lane = lane
        self.num_bytes = 0
        self._folder = tempfile.TemporaryDirectory(prefix="lanes")
        self._loop = asyncio.new_event_loop()
        self._transports: dict[int, Transports] = {}  # by id of the pool
        self._readable: dict[int, Readable] = {}
        self._peers: dict[tuple[int, int], ThreadedPeer] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.run_until_complete(self._close())
        self._loop.close()
        self._folder.cleanup()

    def read(self, source: Pool, target: Pool, plan: Plan, readable: Readable) -> Stats:
        """Carry out a plan; raises TransferError."""
        self._readable[id(source)] = readable
        stats = self._loop.run_until_complete(self._read(source, target, plan))
        self.num_bytes += stats.num_bytes
        return stats

    async def _read(self, source: Pool, target: Pool, plan: Plan) -> Stats:
        way = id(source), id(target)
        if way not in self._peers:
            described = self._of(source).describe()
            self._peers[way] = await self._of(target).connect(described)
            assert self._peers[way].lane == self.lane
        return await self._peers[way].read(plan, 10.0).done()

    def _of(self, pool: Pool) -> Transports:
        transports = self._transports.get(id(pool))
        if transports is None:
            number, listen = len(self._transports), "127.0.0.1:0" if self.lane == "tcp" else None
            force = "tcp" if self.lane == "tcp" else "shm"
            transports = Transports(f"w{number}", number, self._folder.name, "lanes", listen, force=force)
            transports.register(pool, lambda permit, blocks: self._readable[id(pool)](permit, blocks))
            self._transports[id(pool)] = transports
        return transports

    async def _close(self) -> None:
        for transports in self._transports.values():
            await transports.close()
