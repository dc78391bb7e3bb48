"""Live clusters for tests: started as a user's are, talked to over HTTP or, as an API process does, over the socket."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from diptych.config import Cluster, load_cluster
from diptych.policy.messages import Reason
from diptych.serve.api_process import RouterFrontend
from diptych.serve.frontend import Stream
from diptych.serve.process import Orders
from diptych.serve.supervisor import Supervisor


@contextlib.contextmanager
def live(path: Path | None = None, **flags: Any) -> Iterator[Supervisor]:
    """A running cluster on a free port of 127.0.0.1."""
    cluster: Cluster = load_cluster(path, {"port": 0, **flags})
    with Supervisor(cluster) as supervisor:
        supervisor.wait_ready(60.0)
        yield supervisor


@contextlib.asynccontextmanager
async def connected(supervisor: Supervisor) -> AsyncIterator[RouterFrontend]:
    """Another API process's view of the router, without HTTP: token ids in, token ids out."""
    frontend = RouterFrontend()
    await frontend.connect(Orders(supervisor.cluster, supervisor.runtime, supervisor.key, "test"))
    try:
        yield frontend
    finally:
        frontend.close()
        await asyncio.sleep(0.01)  # the socket closes in a later turn of the loop


async def answer_of(stream: Stream) -> tuple[list[int], Reason | None]:
    """All tokens of an answer, and why it ended."""
    tokens: list[int] = []
    while True:
        chunk = await stream.get()
        assert chunk.error is None, chunk.error
        tokens += chunk.tokens
        if chunk.reason is not None:
            return tokens, chunk.reason


async def settled(frontend: RouterFrontend, timeout_s: float = 20.0) -> list[dict[str, Any]]:
    """Wait until no worker holds anything of any request; returns the workers' rows."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        rows = await frontend.workers()
        if all(at_home(row) for row in rows):
            return rows
        assert asyncio.get_running_loop().time() < deadline, f"not every block came home: {rows}"
        await asyncio.sleep(0.05)


def at_home(row: dict[str, Any]) -> bool:
    """Every block of this worker is free or cached, and it knows of no request."""
    blocks = row["blocks"]
    return row["requests"] == 0 and sum(blocks.values()) == blocks["free"] + blocks["cached"]
