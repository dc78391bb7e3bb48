"""What befalls the workers of a simulation: they die and come back, join, drain and leave, and lose their connections.

Everybody concerned hears of it as from a live driver: peers that a process is gone or out of sight, the router who is
up, lost, or out of whose reach. Not responsible for what happens when (`conditions.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from diptych.policy.membership import Drain, LinkDown, LinkUp
from diptych.policy.messages import Cancelled, WorkerLost
from diptych.sim.agenda import instant
from diptych.sim.conditions import ClientGone, Happening, LinkBreaks, WorkerDies, WorkerDrains, WorkerJoins
from diptych.sim.machine import Machine
from diptych.sim.router import ROUTER

if TYPE_CHECKING:
    from diptych.sim.driver import Simulation


class Fates:
    """All that happens to workers from outside."""

    def __init__(self, simulation: Simulation):
        self._simulation = simulation
        self._breaks: dict[frozenset[str], int] = {}  # how often the connection of a pair has broken
        self._apart: set[frozenset[str]] = set()

    def plan(self, happenings: Sequence[Happening]) -> None:
        """Put them on the agenda."""
        machines, front = self._simulation.machines, self._simulation.front
        for what in happenings:
            match what:
                case ClientGone():
                    action = partial(front.tell, Cancelled(what.request))
                case WorkerDies():
                    action = partial(self._die, machines[what.worker], what.back_after_s)
                case WorkerJoins():
                    action = partial(self._join, machines[what.spec.name])
                case WorkerDrains():
                    action = partial(front.tell, Drain(what.worker, what.timeout_s))
                case LinkBreaks():
                    action = partial(self._part, machines[what.one], machines[what.other], what.back_after_s)
            self._later(instant(what.time_s), action)

    def num_breaks(self, one: str, other: str) -> int:
        """What was sent before the latest break of a connection does not arrive after it."""
        return self._breaks.get(frozenset((one, other)), 0)

    def apart(self, one: str, other: str) -> bool:
        """They have no connection now."""
        return frozenset((one, other)) in self._apart

    def dismiss(self, worker: str, incarnation: int) -> None:
        """The router tells a worker, in the incarnation it knows, to go, and hangs up."""
        simulation = self._simulation
        machine = simulation.machines[worker]
        when = simulation.delivery(ROUTER, worker, simulation.agenda.now)
        self._later(when, partial(self._leave_for_good, machine, incarnation))
        simulation.front.tell(WorkerLost(worker))

    def _later(self, when: int, action: partial[None]) -> None:
        self._simulation.agenda.at(when, self._simulation.rank, action)

    # --- processes -----------------------------------------------------------------------------------------------

    def _die(self, machine: Machine, back_after_s: float | None) -> None:
        if not machine.alive:
            return
        heard = self._leave(machine)
        self._simulation.report(machine, WorkerLost(machine.spec.name))
        if back_after_s is not None:
            back = max(self._simulation.agenda.now + instant(back_after_s), heard)  # once every peer is connected to it
            self._later(back, partial(self._revive, machine))

    def _leave_for_good(self, machine: Machine, incarnation: int) -> None:
        if machine.alive and machine.incarnation == incarnation:
            self._leave(machine)

    def _leave(self, machine: Machine) -> int:
        """A process ends; returns the instant at which the last of its peers hears of it."""
        simulation = self._simulation
        simulation.catch_up_one(machine)
        machine.die()
        simulation.reads.lose(machine)
        others = [other for other in simulation.machines.values() if other.alive]
        return max([simulation.agenda.now, *(simulation.post_peer_lost(machine, other) for other in others)])

    def _revive(self, machine: Machine) -> None:
        machine.revive()
        name = machine.spec.name
        for other in [o for o in self._simulation.machines.values() if o.alive and self.apart(name, o.spec.name)]:
            self._apart.discard(frozenset((name, other.spec.name)))
            self._simulation.report(other, LinkUp(other.spec.name, name))
        self._simulation.introduce(machine)

    def _join(self, machine: Machine) -> None:
        machine.alive = True
        self._simulation.introduce(machine)

    # --- connections ---------------------------------------------------------------------------------------------

    def _part(self, one: Machine, other: Machine, back_after_s: float | None) -> None:
        simulation, pair = self._simulation, frozenset((one.spec.name, other.spec.name))
        if not (one.alive and other.alive) or pair in self._apart or one is other:
            return
        simulation.catch_up_one(one)
        simulation.catch_up_one(other)
        self._apart.add(pair)
        self._breaks[pair] = self._breaks.get(pair, 0) + 1
        simulation.reads.part(one, other)
        heard = max(simulation.post_peer_lost(one, other), simulation.post_peer_lost(other, one))
        for machine, peer in ((one, other), (other, one)):
            simulation.report(machine, LinkDown(machine.spec.name, peer.spec.name))
        if back_after_s is not None:
            back = max(simulation.agenda.now + instant(back_after_s), heard)
            self._later(back, partial(self._meet, one, other, (one.incarnation, other.incarnation)))

    def _meet(self, one: Machine, other: Machine, incarnations: tuple[int, int]) -> None:
        if not (one.alive and other.alive) or (one.incarnation, other.incarnation) != incarnations:
            return
        self._apart.discard(frozenset((one.spec.name, other.spec.name)))
        for machine, peer in ((one, other), (other, one)):
            self._simulation.report(machine, LinkUp(machine.spec.name, peer.spec.name))
