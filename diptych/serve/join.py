"""A worker of another host, without a supervisor: `diptych worker --join HOST:PORT --role decode`.

Asks the router what is served, loads it, registers, and works until it is drained. Starting it, placing it and starting
it again is for whoever runs such things: systemd, Kubernetes, Ray, a person. Not responsible for the worker itself
(`worker_process.py`).
"""

import asyncio
import os
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

import msgspec
import uvloop

from diptych.config import Cluster, guest_of
from diptych.errors import ConfigError, PeerLost, ProtocolError
from diptych.policy.messages import Role
from diptych.serve.build import differences, facts_of
from diptych.serve.channel import Channel, call, split_host
from diptych.serve.process import Orders, settings_of, until_told
from diptych.serve.runtime import check_host
from diptych.serve.wire import Hello, Refuse, Terms
from diptych.serve.worker_process import WorkerProcess, prepare

ASK_S = 10.0  # how long the router may take to say what is served


def join(
    address: str,
    key: str,
    role: Role,
    name: str | None = None,
    host: str | None = None,
    flags: dict[str, Any] | None = None,
    on_event: Callable[[str], None] = lambda text: None,
) -> int:
    """Be a worker of the cluster whose router listens there. Returns the exit status, see `WorkerProcess.main`.

    host: by which peers call us (default: the address we call the router from). flags: see `config.guest_of`. Raises
    ConfigError where the cluster and we do not fit together, PeerLost where the router cannot be reached.
    """
    address = address if address.startswith(("tcp:", "unix:")) else f"tcp:{address}"
    if address.startswith("tcp:"):
        split_host(address.removeprefix("tcp:"))
    name = name or make_name(role)
    on_event(f"{name}: asking the router at {address} what is served there ...")
    terms, facts, here = uvloop.run(_ask(address, key, name))
    cluster = guest_of(terms, name, role, flags or {})
    if why := differences(facts, facts_of(cluster, cluster.workers[0])):
        raise ConfigError(f"{name} cannot join: {why}")
    check_host(cluster)
    os.environ.update(settings_of(cluster.workers[0].cores))
    with tempfile.TemporaryDirectory(prefix="diptych-") as runtime:
        # A name that others know this host by may be none that it can listen on itself.
        bind = "0.0.0.0" if host else here
        orders = Orders(cluster, runtime, key, name, now_ms(), join=address, host=host or here or None, bind=bind)
        on_event(f"{name}: loading {cluster.model} ...")
        parts = prepare(orders)
        return uvloop.run(_work(orders, parts, lambda text: on_event(f"{name}: {text}"))) or 0


def now_ms() -> int:
    """A guest's incarnation: later ones of a name have greater numbers, though nobody here counts them."""
    return time.time_ns() // 1_000_000


def make_name(role: Role) -> str:
    """A name that nobody else has: d-host7-3f9a1c."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:40]
    return f"{role.value[0]}-{host}-{secrets.token_hex(3)}"


async def _work(orders: Orders, parts: Any, on_event: Callable[[str], None]) -> int | None:
    return await until_told(WorkerProcess(orders, parts, on_event).main(), fragile=True)


async def _ask(address: str, key: str, name: str) -> tuple[Cluster, tuple[tuple[str, str], ...], str]:
    """What is served there, what must be the same here, and the host part of our end of the connection."""
    answered: asyncio.Future[tuple[Cluster, tuple[tuple[str, str], ...]]] = asyncio.get_running_loop().create_future()

    def heard(message: Any, attachment: bytes) -> None:
        match message:
            case Terms(facts=facts):
                answered.set_result((_read_terms(attachment), facts))
            case Refuse(why=why):
                answered.set_exception(ConfigError(why))
            case _:
                raise ProtocolError(f"a router does not say {type(message).__name__} to a guest")

    def met(channel: Channel) -> None:
        channel.heard = heard
        channel.lost = lambda why: None if answered.done() else answered.set_exception(PeerLost(f"{address}: {why}"))

    channel = await call(address, key, Hello("join", name, 0), met, ASK_S)
    here = channel.here
    try:
        return (*await asyncio.wait_for(answered, ASK_S), here)
    except TimeoutError:
        raise PeerLost(f"{address} did not say within {ASK_S:g} s what is served there") from None
    finally:
        channel.lost = lambda why: None
        channel.close()


def _read_terms(attachment: bytes) -> Cluster:
    try:
        return msgspec.json.decode(attachment, type=Cluster)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"malformed terms: {error}") from None
