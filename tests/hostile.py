"""Peers that know the key and mean harm, or are broken: what they say is well-formed, and nonsense.

Two targets for `fuzz.py`: one behind the router's driver, one beside the drivers of honest workers. Where a driver
raises ProtocolError its process hangs up on who said it (`channel.py`); so do these. Whatever is said: nothing else is
raised, requests that have nothing to do with it are answered right, and all memory comes home.
"""

import contextlib
from collections.abc import Iterator
from random import Random
from typing import Any, get_args

import msgspec

from diptych.config import load_cluster
from diptych.engine.executor import Sampling
from diptych.engine.paced import PacedModel, oracle
from diptych.errors import ProtocolError
from diptych.policy.membership import Drain, Drained, LinkDown, LinkUp
from diptych.policy.messages import (
    Beat,
    Cancel,
    Emit,
    Finish,
    Handover,
    PeerLost,
    Place,
    Publish,
    Reason,
    Retention,
    Role,
    Submitted,
    WorkerUp,
    request_of,
)
from diptych.policy.retention import Replicate
from diptych.policy.router import Router
from diptych.serve.build import build
from diptych.serve.local import LocalCluster
from diptych.serve.router import RouterDriver
from diptych.serve.wire import CODEC, Deliver, Ticket, pack_ids
from diptych.transfer.seam import PERMIT_BYTES

VOCAB = 300
ROLES = {"p0": Role.PREFILL, "d0": Role.DECODE, "m0": Role.MIXED, "evil": Role.MIXED}
NUMBERS = (0, 1, 2, 3, 5, 8, 64, 300, 1 << 31, (1 << 62) - 1)


class _World:
    """Ports of a router's driver, and honest workers that answer what they are given with tokens 1, 2, 3, …"""

    def __init__(self) -> None:
        self.now = 0.0
        self.driver = RouterDriver(Router(), self, lambda: self.now, None, VOCAB)
        self.todo: list[tuple[str, Place]] = []
        self.rids: list[int] = []
        self.answers: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        for name in ROLES:
            self.up(name)

    def up(self, name: str) -> None:
        self.driver.worker_up(WorkerUp(name, 0, ROLES[name], 64, 4))

    def send(self, worker: str, order: Place | Cancel | Drain, attachment: bytes) -> None:
        if isinstance(order, Place):
            self.todo.append((worker, order))
            self.rids.append(order.rid)

    def dismiss(self, worker: str) -> None:
        self.driver.worker_lost(worker)

    def deliver(self, client: Any, message: Deliver, attachment: bytes) -> None:
        assert message.request not in self.ended
        ids = memoryview(attachment[: 4 * message.count]).cast("i").tolist()
        assert len(ids) == message.count and all(0 <= token < VOCAB for token in ids)
        self.answers.setdefault(message.request, []).extend(ids)
        if message.reason or message.status:
            self.ended[message.request] = message.reason or str(message.status)

    def work(self, worker: str, place: Place) -> None:
        """An honest worker's part, all of it at once."""
        first = place.num_tokens - place.num_prompt
        if place.part == Role.PREFILL:
            if place.max_new:
                self.driver.heard(worker, Emit(place.rid, first, 1), pack_ids([first]))
            over = Reason.COMPUTED if not place.max_new else Reason.HANDED_OVER
            last = place.max_new == first + 1
            self.driver.heard(worker, Finish(place.rid, worker, Reason.LENGTH if last else over), b"")
            return
        first += place.part == Role.DECODE
        ids = list(range(first, place.max_new))
        if ids:
            self.driver.heard(worker, Emit(place.rid, first, len(ids)), pack_ids(ids))
        self.driver.heard(worker, Finish(place.rid, worker, Reason.LENGTH), b"")

    def work_off(self) -> None:
        """Whatever honest workers were given, in any order; what the hostile one was given stays."""
        mine = [each for each in self.todo if each[0] == "evil"]
        work, self.todo = [each for each in self.todo if each[0] != "evil"], mine
        for worker, place in work:
            self.work(worker, place)


def hostile_worker(rng: Random) -> None:
    """One of four workers says to the router whatever it likes."""
    world = _World()
    driver = world.driver
    wanted = {}
    for number in range(1, rng.randrange(3, 12)):
        wanted[number] = rng.choice((0, 1, 2, 7))
        num_prompt = rng.choice((1, 5, 40))
        ticket = Ticket(pack_ids([3] * num_prompt), num_prompt, Sampling(), b"")
        driver.submit("client", Submitted(number, num_prompt, wanted[number]), ticket)
        for _ in range(rng.randrange(4)):
            message, attachment = _said_to_router(rng, world)
            message = CODEC.decode(CODEC.encode(message))
            try:
                if isinstance(message, Emit | Finish):
                    driver.heard("evil", message, attachment)
                elif message.timeout_s < 1e300 if isinstance(message, Drain) else message.worker == "evil":
                    driver.told(message)
            except ProtocolError:
                driver.worker_lost("evil")
                world.todo = [each for each in world.todo if each[0] != "evil"]
                world.up("evil")
        if rng.random() < 0.3:
            world.work_off()
    driver.worker_lost("evil")
    world.todo = [each for each in world.todo if each[0] != "evil"]
    while world.todo:
        world.work_off()
    num = driver.policy.num
    assert num["submitted"] == len(wanted) == sum(num.values()) - num["submitted"] and not driver.num_open
    assert set(world.ended) == set(wanted), (world.ended, wanted)
    for number, tokens in world.answers.items():
        assert len(tokens) <= wanted[number]


def _said_to_router(rng: Random, world: _World) -> tuple[Any, bytes]:
    rid = rng.choice((*world.rids[-6:], rng.choice(NUMBERS), 64 * rng.randrange(1, 9) + rng.randrange(64)))
    count = rng.choice((0, 1, 1, 2, 7, rng.choice(NUMBERS)))
    ids = [rng.choice((0, 5, 299, 300, -1, 2**31 - 1)) if rng.random() < 0.4 else 7 for _ in range(min(count, 9))]
    match rng.randrange(6):
        case 0 | 1 | 2:
            return Emit(rid, rng.choice((0, 0, 1, 2, rng.choice(NUMBERS))), count), pack_ids(ids) + rng.randbytes(
                rng.choice((0, 0, 4, 7))
            )
        case 3:
            return Finish(rid, rng.choice(("evil", "evil", "p0")), rng.choice(list(Reason)), (("x", 1.0),)), b""
        case 4:
            return rng.choice((LinkDown, LinkUp))("evil", rng.choice(("p0", "d0", "nobody", "evil"))), b""
        case _:
            return rng.choice((Drain("evil", rng.choice((0.0, 5.0, float("inf")))), Drained("evil"))), b""


class _Watched(LocalCluster):
    """Notes which requests the hostile worker was given, so that the others can be held to their answers."""

    def __init__(self, *parts: Any) -> None:
        self.tainted: set[int] = set()
        super().__init__(*parts)
        hear = self.workers["p1"].told

        def shrug(*said: Any) -> None:
            """What others answer to nonsense may be nonsense to it."""
            with contextlib.suppress(ProtocolError):
                hear(*said)

        evil = self.workers["p1"]
        evil.told = shrug  # type: ignore[method-assign]
        evil._ports.tell = lambda *said: self.later(lambda: self.say(*said))  # type: ignore[method-assign]

    def say(self, victim: str, said: Any, attachment: bytes) -> None:
        """p1 says something, and is hung up on, and called again, where that cannot be."""
        try:
            self.workers[victim].told("p1", said, attachment)
        except ProtocolError:
            self.workers[victim].on(PeerLost("p1"))
            self.workers["p1"].on(PeerLost(victim))

    def send(self, worker: str, order: Place | Cancel | Drain, attachment: bytes) -> None:
        if isinstance(order, Place) and "p1" in (worker, order.peer):
            self.tainted.add(request_of(order.rid))
        super().send(worker, order, attachment)


class HostilePeer:
    """Two prefill and two decode workers of a paced model, of which one, p1, says what it likes to the others."""

    def __init__(self) -> None:
        flags = {"engine": "paced", "prefill": 2, "decode": 2, "kv_memory": 60 * 16 * 64, "chunk": 32}
        self.model = PacedModel(vocab=VOCAB)  # at no cost
        self.config = msgspec.structs.replace(load_cluster(None, flags), paced=self.model)

    def __call__(self, rng: Random) -> None:
        cluster = _Watched([build(self.config, worker) for worker in self.config.workers])
        try:
            self._case(rng, cluster)
        finally:
            cluster.close()

    def _case(self, rng: Random, cluster: _Watched) -> None:
        prompts = [[rng.randrange(300) for _ in range(rng.choice((3, 20, 70)))] for _ in range(6)]
        answers = [cluster.submit(prompt, rng.choice((2, 20, 40)), Sampling()) for prompt in prompts]
        wanted = [cluster.router._open[number].max_new for number in range(1, 7)]
        for _ in range(rng.randrange(30)):
            for _ in range(rng.randrange(20)):
                cluster.step()
            self._harm(rng, cluster, rng.choice(("p0", "d0", "d1")))
        while cluster.step() and not all(answer.over for answer in answers):
            pass
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
            if number not in cluster.tainted:
                assert answer.tokens == oracle(prompt, wanted[number - 1], self.model), number
            elif not answer.over:  # who was to help with it does not: only its client, or a time limit, can end it
                cluster.cancel(answer)
        cluster.settle()
        for peer in ("p0", "d0", "d1"):
            cluster.workers[peer].on(PeerLost("p1"))
        cluster.settle()
        cluster.clock = lambda: 1e9
        for driver in cluster.workers.values():
            driver._clock = cluster.clock
        while cluster.step():
            pass
        for name in ("p0", "d0", "d1"):
            policy = cluster.workers[name].policy
            policy.pool.check()
            counts = policy.pool.counts()
            assert counts["free"] + counts["cached"] == policy.spec.num_blocks and not policy.seqs, (name, counts)

    def _harm(self, rng: Random, cluster: _Watched, victim: str) -> None:
        said, attachment = _said_to_peer(
            rng, [64 * number + attempt for number in range(1, 8) for attempt in (0, 0, 1)]
        )
        cluster.say(victim, CODEC.decode(CODEC.encode(said)), attachment)


def _said_to_peer(rng: Random, rids: list[int]) -> tuple[Any, bytes]:
    kind = rng.choice((*get_args(Handover), *get_args(Retention), Publish, Publish, Replicate))
    peer, rid = rng.choice(("p1", "p1", "p1", "p1", "p0")), rng.choice((*rids, rng.choice(NUMBERS)))
    blocks = tuple(_blocks(rng))
    if kind is Publish:
        final = rng.random() < 0.5
        sums = rng.randbytes(PERMIT_BYTES + 8 * len(blocks)) + (
            pack_ids([rng.choice((5, 299, 400, -1))]) if final else b""
        )
        covered = rng.choice((16 * len(blocks), len(blocks), 3, 20, 70, rng.choice(NUMBERS)))
        return Publish(peer, rid, blocks, covered, final), sums if rng.random() < 0.9 else b"x"
    if kind is Replicate:
        hashes = tuple(rng.randbytes(16) for _ in range(len(blocks) if rng.random() < 0.9 else 1))
        return Replicate(peer, rid, rng.choice((0, 1, 4, *NUMBERS)), blocks, hashes), rng.randbytes(
            PERMIT_BYTES + 8 * len(blocks)
        )
    if kind is Beat:
        return Beat(peer, tuple(rng.choice(rids) for _ in range(rng.randrange(4)))), b""
    rest = [rng.choice(NUMBERS)] if kind.__name__ in ("Offer", "Replicated") else []
    rest = [rng.random() < 0.6] if kind.__name__ == "Answer" else rest
    return kind(peer, rid, *rest), b""


def _blocks(rng: Random) -> Iterator[int]:
    for _ in range(rng.choice((0, 1, 1, 2, 5, 70))):
        yield (
            rng.choice((0, 1, 7, 59, 60, 1 << 30, (1 << 31) - 1, 1 << 31)) if rng.random() < 0.3 else rng.randrange(60)
        )
