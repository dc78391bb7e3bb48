"""Drives the router in virtual time, and keeps what its clients see.

The counterpart of `serve/router.py`: where tokens arrive, what an earlier attempt still says is dropped, and it is
known how many tokens a client has. Not responsible for any decision, nor for the workers (`driver.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diptych.policy.books import RouterSpec
from diptych.policy.membership import Dismiss, Drain
from diptych.policy.messages import (
    MAX_ATTEMPTS,
    WELL,
    Cancel,
    Cancelled,
    Emit,
    Failed,
    Finish,
    Place,
    Progress,
    Reason,
    Reject,
    RouterEvent,
    RouterOrder,
    Tick,
    WorkerLost,
    WorkerUp,
    request_of,
)
from diptych.policy.router import Router
from diptych.policy.sequencer import Sequencer
from diptych.sim.agenda import not_before, seconds
from diptych.sim.streams import Stream, Stretch
from diptych.sim.workload import Arrival

if TYPE_CHECKING:
    from diptych.sim.driver import Simulation

ROUTER = "router"
GIVEN_UP = (Reason.PEER_LOST, Reason.REFUSED, Reason.WORKER_LOST)


@dataclass(frozen=True, slots=True)
class Report:
    """All that came of one event on a worker, so that a last token and its Finish are never parted.

    Each Emit says as many tokens as `stretch` has; it has the times at which they arrive.
    """

    orders: Sequence[Emit | Finish]
    stretch: Stretch | None

    def part(self, begin: int, end: int) -> Report:
        """Tokens begin..end of each Emit; a Finish goes with the last."""
        stretch = self.stretch
        if stretch is None or (begin, end) == (0, stretch.num):
            return self
        orders: list[Emit | Finish] = []
        for order in self.orders:
            if isinstance(order, Emit):
                orders.append(replace(order, first=order.first + begin, count=end - begin))
            elif end == stretch.num:
                orders.append(order)
        return Report(orders, stretch.part(begin, end))


class RouterSide:
    """The router, and one stream for each request."""

    def __init__(self, simulation: Simulation, spec: RouterSpec, arrivals: Sequence[Arrival]):
        self.policy = Router(spec)
        self.streams = [Stream(i, arrival) for i, arrival in enumerate(arrivals)]
        self._simulation = simulation
        self._known: dict[str, int] = {}  # the incarnation of each worker the router is connected to
        self._spoken: set[int] = set()  # attempts of which the client has a token
        self._deadline: float | None = None  # for which a Tick is planned
        self._order: dict[int, Sequencer[tuple[str, Stretch | None]]] = {}  # of each request's present attempt

    def tell(self, event: RouterEvent) -> None:
        """The router hears something now."""
        simulation = self._simulation
        if isinstance(event, Cancelled | WorkerLost) or (isinstance(event, Finish) and event.reason in GIVEN_UP):
            simulation.catch_up()  # how many tokens the client has matters now
        event = self._complete(event)
        now = seconds(simulation.agenda.now)
        orders = self.policy.on(now, event)
        simulation.observe(now, ROUTER, event, orders)
        for order in orders:
            self._carry_out(order)
        self._plan_tick()

    def _plan_tick(self) -> None:
        deadline = self.policy.next_deadline()
        if deadline is not None and deadline != self._deadline:
            simulation = self._simulation
            simulation.agenda.at(not_before(deadline), simulation.rank, self._tick, deadline)
        self._deadline = deadline

    def _tick(self, deadline: float) -> None:
        if deadline == self._deadline:
            self._deadline = None
            self.tell(Tick())

    def hear(self, worker: str, report: Report) -> None:
        """What came of one event on a worker arrives; what an earlier attempt still says is dropped."""
        for order in report.orders:
            if self._is_present(order.rid):
                self._take(worker, order, report.stretch)

    def _take(self, worker: str, order: Emit | Finish, stretch: Stretch | None) -> None:
        for said, (_, when) in self._order[request_of(order.rid)].take(order, (worker, stretch)):
            if not self._is_present(said.rid):
                return
            if isinstance(said, Finish):
                self.tell(said)
            else:
                assert when is not None, "tokens come from steps"
                self._emitted(said, when)

    def _emitted(self, order: Emit, stretch: Stretch) -> None:
        stream = self.streams[request_of(order.rid)]
        stream.append(order.first, stretch)
        if order.rid not in self._spoken:
            self._spoken.add(order.rid)
            self.tell(Progress(order.rid))

    def _complete(self, event: RouterEvent) -> RouterEvent:
        """Take note of an event, and add what only this side knows."""
        match event:
            case Finish() if event.reason in GIVEN_UP:
                have = self.streams[request_of(event.rid)].num_tokens
                return Failed(event.rid, event.worker, have, event.reason)
            case Finish():
                self._note_finish(event)
            case WorkerLost(worker=worker):
                return WorkerLost(worker, self._written(worker))
            case WorkerUp():
                self._known[event.worker] = event.incarnation
            case Cancelled(request=request) if request in self.policy.requests:
                self._close(request, "cancelled", "")
        return event

    def _note_finish(self, event: Finish) -> None:
        """Keep how long each rung took; the stream ends here if this is how its request ends."""
        stream = self.streams[request_of(event.rid)]
        for rung, spent in event.rungs:
            stream.rungs[rung] = stream.rungs.get(rung, 0.0) + spent
        if event.reason in WELL:
            self._close(stream.request, "finished", event.reason)

    def _written(self, worker: str) -> tuple[tuple[int, int], ...]:
        """What the clients of a lost worker's requests have."""
        return tuple(
            (view.rid, self.streams[number].num_tokens)
            for number, view in self.policy.requests.items()
            if worker in (view.prefill, view.decode)
        )

    def _is_present(self, rid: int) -> bool:
        view = self.policy.requests.get(request_of(rid))
        return view is not None and view.rid == rid

    def _carry_out(self, order: RouterOrder) -> None:
        match order:
            case Place():
                stream = self.streams[request_of(order.rid)]
                stream.paired = order.peer != ""
                stream.num_attempts = order.rid % MAX_ATTEMPTS + 1
                self._order[stream.request] = Sequencer(stream.num_tokens)
                self._simulation.post(ROUTER, order.worker, self._known[order.worker], order)
            case Dismiss(worker=worker):
                self._simulation.fates.dismiss(worker, self._known[worker])
            case Cancel() | Drain():
                self._simulation.post(ROUTER, order.worker, self._known[order.worker], order)
            case Reject():
                began = self.streams[order.request].num_attempts > 0
                self._close(order.request, "failed" if began else "rejected", order.why)

    def _close(self, request: int, status: str, why: str) -> None:
        stream = self.streams[request]
        stream.status, stream.why, stream.ended = status, why, self._simulation.agenda.now
