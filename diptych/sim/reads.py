"""Reads of KV in virtual time: over shared links, with failures, cancels and deaths.

Every `Pull` is answered once: by `Read`, by `Settled` (it was cancelled), or by `ReadFailed` and then `Settled`.

Not responsible for what is in the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diptych.policy.messages import Pull, Read, ReadFailed, Settled, WorkerEvent
from diptych.sim.agenda import instant, seconds
from diptych.sim.conditions import Conditions
from diptych.sim.costs import Link
from diptych.sim.links import SharedLink
from diptych.sim.machine import Machine

if TYPE_CHECKING:
    from diptych.sim.driver import Simulation

LinkKey = tuple[str, str]
TransferKey = tuple[str, int, int]  # reader, its incarnation, pull


@dataclass(slots=True)
class Transfer:
    """One read under way."""

    reader: Machine
    order: Pull
    link: LinkKey
    num_bytes: int
    began: int
    over: bool = False  # whatever ends it is on its way to the reader


class Reads:
    """All reads of a simulation."""

    def __init__(self, simulation: Simulation, link: Link, conditions: Conditions, kv_bytes_per_token: int):
        self.num_bytes = 0
        self._simulation = simulation
        self._link = link
        self._conditions = conditions
        self._token_bytes = kv_bytes_per_token
        self._links: dict[LinkKey, SharedLink] = {}
        self._turns: dict[LinkKey, int] = {}  # how often the next end on a link was planned anew
        self._transfers: dict[TransferKey, Transfer] = {}

    def start(self, machine: Machine, order: Pull) -> None:
        """A worker begins to read. What was published by a process that is gone cannot be read from its successor."""
        source = self._simulation.machines[order.peer]
        num_bytes = len(order.source) * machine.spec.block_size * self._token_bytes
        link = self._link.key(order.peer, machine.spec.name)
        transfer = Transfer(machine, order, link, num_bytes, self._simulation.agenda.now)
        self._transfers[self._key(transfer)] = transfer
        parted = self._simulation.fates.apart(machine.spec.name, order.peer)
        if source.alive and order.rid in source.placed and not parted:
            self._shared(link).add(transfer.began, self._key(transfer), num_bytes)
            self._plan(link)
        else:
            self._fail(transfer, "the peer is gone")

    def cancel(self, machine: Machine, pull: int) -> None:
        """A worker asks for a read to stop."""
        transfer = self._transfers.get((machine.spec.name, machine.incarnation, pull))
        if transfer is None or transfer.over:
            return
        settle_s = self._conditions.settle_s(machine.spec.name, transfer.order)
        if settle_s is not None:
            self._leave(transfer)
            self._answer(transfer, instant(settle_s), Settled(pull), last=True)

    def lose(self, machine: Machine) -> None:
        """A process is gone: nobody reads from it any more, nor does it."""
        for key, transfer in list(self._transfers.items()):
            if transfer.reader is machine:
                if not transfer.over:
                    self._leave(transfer)
                del self._transfers[key]
            elif transfer.order.peer == machine.spec.name and not transfer.over:
                self._leave(transfer)
                self._fail(transfer, "the peer is gone")

    def part(self, one: Machine, other: Machine) -> None:
        """Two workers lose their connection: what either reads of the other fails."""
        pair = {one.spec.name, other.spec.name}
        for transfer in list(self._transfers.values()):
            if {transfer.reader.spec.name, transfer.order.peer} == pair and not transfer.over:
                self._leave(transfer)
                self._fail(transfer, "the connection broke")

    def _key(self, transfer: Transfer) -> TransferKey:
        return transfer.reader.spec.name, transfer.reader.incarnation, transfer.order.pull

    def _shared(self, link: LinkKey) -> SharedLink:
        if link not in self._links:
            self._links[link] = SharedLink(self._link.rate(link))
        return self._links[link]

    def _plan(self, link: LinkKey) -> None:
        """Put the next end on a link on the agenda; earlier plans are void."""
        turn = self._turns[link] = self._turns.get(link, 0) + 1
        due = self._shared(link).next_end()
        if due is not None:
            self._simulation.agenda.at(due[0], self._simulation.rank, self._ended, link, turn)

    def _ended(self, link: LinkKey, turn: int) -> None:
        due = self._shared(link).next_end()
        if turn != self._turns[link] or due is None:
            return
        transfer = self._transfers[due[1]]  # type: ignore[index]  # links hold our keys only
        self._leave(transfer)
        order = transfer.order
        why = self._conditions.read_error(transfer.reader.spec.name, order)
        if why:
            self._fail(transfer, why)
            return
        self.num_bytes += transfer.num_bytes
        spent = seconds(self._simulation.agenda.now - transfer.began) + self._link.latency_s
        delay = instant(self._link.latency_s)
        self._answer(transfer, delay, Read(order.pull, transfer.num_bytes, spent), last=True)

    def _leave(self, transfer: Transfer) -> None:
        """It uses its link no more."""
        self._shared(transfer.link).remove(self._simulation.agenda.now, self._key(transfer))
        self._plan(transfer.link)

    def _fail(self, transfer: Transfer, why: str) -> None:
        order = transfer.order
        settle_s = self._conditions.settle_s(transfer.reader.spec.name, order) or 0.0
        delay = instant(self._link.latency_s)
        self._answer(transfer, delay, ReadFailed(order.pull, why), last=False)
        self._answer(transfer, delay + instant(settle_s), Settled(order.pull), last=True)

    def _answer(self, transfer: Transfer, delay: int, event: WorkerEvent, last: bool) -> None:
        transfer.over = True
        agenda, machine = self._simulation.agenda, transfer.reader
        agenda.at(agenda.now + delay, self._simulation.rank, self._say, self._key(transfer), machine, event, last)

    def _say(self, key: TransferKey, machine: Machine, event: WorkerEvent, last: bool) -> None:
        if key not in self._transfers:
            return  # the reader died
        if last:
            del self._transfers[key]
        self._simulation.tell(machine, event)
