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
from typing import Any

import msgspec
import uvloop

from diptych.config import Cluster
from diptych.errors import DiptychError
from diptych.serve import logs

_PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class Orders(msgspec.Struct, frozen=True):
    """What a process is to be, and where the others are."""

    cluster: Cluster
    runtime: str  # a private folder for sockets
    key: str
    name: str
    incarnation: int = 0
    fd: int | None = None  # the API's listening socket

    @property
    def router(self) -> str:
        """The router's address."""
        return f"unix:{self.runtime}/router.sock"


def run(
    main: Callable[[Orders], Awaitable[None]],
    prepare: Callable[[Orders], object] | None = None,
    fragile: bool = True,
) -> None:
    """Read orders from standard input and run `main` until it ends; a DiptychError ends the process with its message.

    `prepare` runs before the event loop does (importing, loading). fragile: an exception nobody caught ends it too.
    """
    orders = msgspec.json.decode(sys.stdin.buffer.read(), type=Orders)
    die_with_parent()
    logs.set_up(orders.name, orders.cluster.log_format, orders.cluster.log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the supervisor says when to stop
    try:
        if prepare is not None:
            prepare(orders)
        uvloop.run(_until_told(main(orders), fragile))
    except DiptychError as error:
        print(f"diptych {orders.name}: {error}", file=sys.stderr, flush=True)
        os._exit(3)


def _die(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event that was handled halfway leaves a state nobody planned for: end, and let others take over."""
    log.critical("%s; this process ends", context.get("message"), exc_info=context.get("exception"))
    os._exit(1)


async def _until_told(main: Awaitable[None], fragile: bool) -> None:
    """Run `main` until it ends or SIGTERM comes; then it is cancelled and may clean up."""
    task = asyncio.ensure_future(main)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    if fragile:
        loop.set_exception_handler(_die)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent does (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
