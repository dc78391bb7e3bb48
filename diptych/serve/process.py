"""What every process of a cluster does at its start and end: read its orders, die with its parent, stop when told.

A process is started as `python -m diptych.serve.<its module>` with a JSON `Orders` on standard input, so that neither
the key nor the configuration shows in a process list. Not responsible for starting them (`supervisor.py`).
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from diptych.config import Cluster
from diptych.errors import ConfigError, DiptychError
from diptych.serve import logs
from diptych.serve.liveness import PULSE_S

WRONG = 3  # the exit status of a process that cannot be what it is told to be, until a flag or a file says otherwise
_PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class Orders(msgspec.Struct, frozen=True):
    """What a process is to be, and where the others are.

    `host`: by which workers of other hosts call this one, and `bind` the address to listen on for them; None: there are
    none, and unix sockets will do.
    """

    cluster: Cluster
    runtime: str  # a private folder for sockets
    key: str
    name: str
    incarnation: int = 0
    fd: int | None = None  # a socket that listens: the API's, or the router's for other hosts
    join: str | None = None  # the router's address, where it is on another host
    host: str | None = None
    bind: str | None = None

    @property
    def router(self) -> str:
        """The router's address."""
        return self.join or f"unix:{self.runtime}/router.sock"

    @property
    def alive(self) -> Path:
        """A file that the router and the API process touch as long as their event loops turn."""
        return Path(self.runtime, f"{self.name}.alive")

    @property
    def stopping(self) -> Path:
        """A file that is there once the whole cluster is to stop."""
        return Path(self.runtime, "stopping")

    @property
    def up(self) -> Path:
        """A file that a worker makes when it is up, for whoever started it."""
        return Path(self.runtime, f"{self.name}.{self.incarnation}.up")


def run(
    main: Callable[[Orders], Awaitable[int | None]],
    prepare: Callable[[Orders], object] | None = None,
    fragile: bool = True,
) -> None:
    """Read orders from standard input and run `main` until it ends; a DiptychError ends the process with its message.

    What `main` returns is the exit status.
    `prepare` runs before the event loop does (importing, loading). fragile: an exception nobody caught ends it too.
    """
    orders = msgspec.json.decode(sys.stdin.buffer.read(), type=Orders)
    die_with_parent()
    logs.set_up(orders.name, orders.cluster.log_format, orders.cluster.log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the supervisor says when to stop
    try:
        if prepare is not None:
            prepare(orders)
        sys.exit(uvloop.run(until_told(main(orders), fragile)))
    except DiptychError as error:
        print(f"diptych {orders.name}: {error}", file=sys.stderr, flush=True)
        os._exit(WRONG if isinstance(error, ConfigError) else 1)


async def show_life(orders: Orders) -> None:
    """Touch a file for the supervisor to see, until cancelled."""
    while True:
        with contextlib.suppress(OSError):
            orders.alive.touch()
        await asyncio.sleep(PULSE_S)


def _die(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event that was handled halfway leaves a state nobody planned for: end, and let others take over."""
    log.critical("%s; this process ends", context.get("message"), exc_info=context.get("exception"))
    os._exit(1)


async def until_told(main: Awaitable[int | None], fragile: bool) -> int | None:
    """Run `main` until it ends or SIGTERM comes: then it is cancelled, unless it has a handler of its own."""
    task = asyncio.ensure_future(main)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    if fragile:
        loop.set_exception_handler(_die)
    with contextlib.suppress(asyncio.CancelledError):
        return await task
    return None


def settings_of(cores: tuple[int, ...]) -> dict[str, str]:
    """Environment of a process that computes on these cores, to be set before torch is loaded.

    OpenMP threads that spin while they wait would take the core from whoever they wait for.
    """
    threads = str(max(len(cores), 1))
    return {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent does (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
