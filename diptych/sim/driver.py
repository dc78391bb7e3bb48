"""The virtual-time driver: one router and any number of workers, the very objects that serve live.

Carries out what they order against a clock that jumps: steps take what the cost model says, reads share links, messages
take their time and keep their order for each (sender, receiver). Same arguments, same bytes.

Not responsible for any decision. Of what policies do not know it keeps the true output lengths and the tokens the
client has.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from diptych.policy.batching import WorkerSpec
from diptych.policy.books import RouterSpec
from diptych.policy.membership import Drained, LinkMeasured
from diptych.policy.messages import (
    CancelPull,
    Emit,
    Finish,
    Handover,
    Message,
    PeerLost,
    Place,
    Pull,
    Retention,
    RouterEvent,
    Run,
    Submitted,
    Tick,
    WorkerEvent,
    WorkerOrder,
    WorkerUp,
    request_of,
)
from diptych.policy.router import Router
from diptych.sim.agenda import Agenda, instant, not_before, seconds
from diptych.sim.conditions import Calm, Conditions, Happening, WorkerJoins
from diptych.sim.costs import Costs, Link
from diptych.sim.fates import Fates
from diptych.sim.machine import Execution, Machine
from diptych.sim.reads import Reads
from diptych.sim.router import ROUTER as ROUTER
from diptych.sim.router import Report, RouterSide
from diptych.sim.streams import Stream, Stretch
from diptych.sim.workload import Arrival

PeerMessage = Handover | Retention
Observer = Callable[[float, str, Message, Sequence[Message]], None]


class Stuck(RuntimeError):
    """More happened than was allowed for: something goes round in circles."""


@dataclass(frozen=True, slots=True)
class MachineStats:
    """What one worker did."""

    name: str
    role: str
    busy_s: float
    num_steps: int
    num_preempted: int


@dataclass(frozen=True, slots=True)
class SimResult:
    """What came of a simulation. `counts` are the router's: submitted, finished, rejected, cancelled, failed."""

    streams: tuple[Stream, ...]
    machines: tuple[MachineStats, ...]
    counts: dict[str, int]
    duration_s: float
    num_events: int
    kv_bytes: int


class Simulation:
    """One run. `observer(now, name, event, orders)` hears everything every object hears and says.

    bulk: take steps that repeat as one where nothing can change. num_events: at most, then Stuck is raised.
    """

    def __init__(
        self,
        cluster: Sequence[WorkerSpec],
        router: RouterSpec,
        costs: Costs,
        link: Link,
        arrivals: Iterable[Arrival],
        *,
        conditions: Conditions | None = None,
        happenings: Sequence[Happening] = (),
        observer: Observer | None = None,
        bulk: bool = True,
        num_events: int | None = None,
    ):
        cluster = [*cluster, *(what.spec for what in happenings if isinstance(what, WorkerJoins))]
        if len({spec.name for spec in cluster}) < len(cluster) or ROUTER in {spec.name for spec in cluster}:
            raise ValueError("workers need names of their own")
        if len({spec.block_size for spec in cluster}) > 1:
            raise ValueError("workers of one cluster share a block size: KV travels between them, and so do hashes")
        arrivals = list(arrivals)
        self.agenda = Agenda()
        self.machines = {s.name: Machine(i, s, costs.of(s.name), arrivals) for i, s in enumerate(cluster)}
        for what in happenings:
            if isinstance(what, WorkerJoins):
                self.machines[what.spec.name].alive = False
        self.front = RouterSide(self, router, arrivals)
        self.fates = Fates(self)
        self._conditions = conditions or Calm(costs.message_s, costs.settle_s)
        self.reads = Reads(self, link, self._conditions, costs.kv_bytes_per_token)
        self._token_bytes = costs.kv_bytes_per_token
        self._observer = observer
        self._bulk = bulk
        self._num_events = num_events
        self._last: dict[tuple[str, str], int] = {}  # when the latest message of a pair arrives
        self._ran: Stretch | None = None  # the steps of which a worker is being told
        self._happenings = happenings

    @property
    def rank(self) -> int:
        """Of everything that is neither the end of a step (below) nor a tick (above)."""
        return len(self.machines)

    @property
    def router(self) -> Router:
        """The router's policy."""
        return self.front.policy

    def run(self) -> SimResult:
        """Let everything happen."""
        self._begin()
        agenda = self.agenda
        while agenda.step():
            if self._num_events is not None and agenda.num_happened > self._num_events:
                raise Stuck(f"{agenda.num_happened} events, at {seconds(agenda.now)} s; {self.front.policy.num}")
        return self._result()

    # --- beginning and end ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        for machine in self.machines.values():
            if machine.alive:
                self.introduce(machine)
        self.fates.plan(self._happenings)
        self._await_arrival(0)

    def _await_arrival(self, index: int) -> None:
        if index < len(self.front.streams):
            when = instant(self.front.streams[index].arrival.time_s)
            self.agenda.at(when, self.rank, self._arrive, index)

    def _arrive(self, index: int) -> None:
        wanted = self.front.streams[index].arrival
        self.front.tell(Submitted(index, wanted.num_prompt, wanted.max_new, wanted.hashes, wanted.priority))
        self._await_arrival(index + 1)

    def introduce(self, machine: Machine) -> None:
        """The router hears that a worker is up."""
        spec = machine.spec
        up = WorkerUp(spec.name, machine.incarnation, spec.role, spec.num_blocks, spec.block_size, self._token_bytes)
        if self.agenda.num_happened == 0:
            self.front.tell(up)  # the cluster stands before the first request
        else:
            self.report(machine, up)

    def _result(self) -> SimResult:
        machines = tuple(
            MachineStats(
                m.spec.name,
                m.spec.role,
                seconds(m.busy),
                m.num_steps,
                m.num_preempted + (m.worker.num_preempted if m.alive else 0),
            )
            for m in self.machines.values()
        )
        ended = max((stream.ended for stream in self.front.streams), default=0)
        return SimResult(
            tuple(self.front.streams), machines, dict(self.front.policy.num), seconds(ended), self.agenda.num_happened,
            self.reads.num_bytes,
        )  # fmt: skip

    # --- messages ------------------------------------------------------------------------------------------------

    def observe(self, now: float, name: str, event: Message, orders: Sequence[Message]) -> None:
        """Whoever watches hears of it."""
        if self._observer is not None:
            self._observer(now, name, event, orders)

    def post(self, sender: str, receiver: str, incarnation: int, event: WorkerEvent) -> None:
        """Send a worker something, as long as the process it is meant for lives."""
        when = self.delivery(sender, receiver, self.agenda.now)
        via = (sender, receiver, self.fates.num_breaks(sender, receiver))
        self.agenda.at(when, self.rank, self._deliver, self.machines[receiver], incarnation, via, event)

    def post_peer_lost(self, lost: Machine, other: Machine) -> int:
        """Let one worker know that another is out of its sight; returns the instant at which it does."""
        self.post(lost.spec.name, other.spec.name, other.incarnation, PeerLost(lost.spec.name))
        return self._last[lost.spec.name, other.spec.name]

    def catch_up(self) -> None:
        """All that is computed by now was told."""
        for machine in self.machines.values():
            self.catch_up_one(machine)

    def report(self, machine: Machine, event: RouterEvent) -> None:
        """A worker, or whoever watches over it, says something to the router, after all that it computed before."""
        self.catch_up_one(machine)
        when = self.delivery(machine.spec.name, ROUTER, self.agenda.now)
        self.agenda.at(when, self.rank, self.front.tell, event)

    # --- workers -------------------------------------------------------------------------------------------------

    def _deliver(self, machine: Machine, incarnation: int, via: tuple[str, str, int], event: WorkerEvent) -> None:
        """A message arrives, if the process it was sent to still lives and the connection did not break on the way."""
        unbroken = self.fates.num_breaks(via[0], via[1]) == via[2]
        if machine.alive and machine.incarnation == incarnation and unbroken:
            if isinstance(event, Place):
                event = machine.place(event)
            self.tell(machine, event)

    def tell(self, machine: Machine, event: WorkerEvent) -> None:
        """A worker hears something now; of a bulk of steps those that are done come first."""
        self.catch_up_one(machine)
        self._tell(machine, self.agenda.now, event)

    def _tell(self, machine: Machine, when: int, event: WorkerEvent) -> None:
        now = seconds(when)
        if isinstance(event, Tick):
            now = max(now, machine.worker.next_deadline() or now)
        orders = machine.worker.on(now, event)
        self.observe(now, machine.spec.name, event, orders)
        reports: list[Emit | Finish] = []
        for order in orders:
            self._carry_out(machine, when, order, reports)
        if reports:
            self._send_report(machine, when, reports)
        if Drained(machine.spec.name) in orders:
            self.report(machine, Drained(machine.spec.name))
        self._plan_end(machine)
        self._plan_tick(machine)

    def _carry_out(self, machine: Machine, when: int, order: WorkerOrder, reports: list[Emit | Finish]) -> None:
        match order:
            case Run():
                machine.submit(order, when)
            case Emit() | Finish():
                reports.append(order)
            case Pull():
                self.reads.start(machine, order)
            case CancelPull(pull=pull):
                self.reads.cancel(machine, pull)
            case Drained():
                pass  # said after all else
            case LinkMeasured():
                self.report(machine, order)
            case _:
                self._send(machine, order)

    def _send_report(self, machine: Machine, when: int, orders: list[Emit | Finish]) -> None:
        """One message. Of a bulk of steps each token arrives when it would have, had they been told one by one."""
        name, now, ran = machine.spec.name, self.agenda.now, self._ran
        delay = self.delivery(name, ROUTER, when) - when
        if ran is None:
            self.agenda.at(when + delay, self.rank, self.front.hear, name, Report(orders, None))
            return
        stretch = ran.later(delay)
        report = Report(orders, stretch)
        begin = stretch.num_before(now)
        if begin:
            self.front.hear(name, report.part(0, begin))
        for i in range(begin, stretch.num):
            self.agenda.at(stretch.token(i), self.rank, self.front.hear, name, report.part(i, i + 1))

    def _send(self, machine: Machine, order: PeerMessage) -> None:
        """To a peer; one that is gone is reported as lost, again if need be."""
        sender, peer = machine.spec.name, self.machines[order.peer]
        if peer.alive and not self.fates.apart(sender, order.peer):
            self.post(sender, order.peer, peer.incarnation, replace(order, peer=sender))
        else:
            self.post(order.peer, sender, machine.incarnation, PeerLost(order.peer))

    def delivery(self, sender: str, receiver: str, sent: int) -> int:
        """When a message arrives: never before an earlier one."""
        when = sent + instant(self._conditions.message_s(sender, receiver))
        when = self._last[sender, receiver] = max(when, self._last.get((sender, receiver), 0))
        return when

    # --- steps and ticks -----------------------------------------------------------------------------------------

    def _plan_end(self, machine: Machine) -> None:
        """Settle how often the step under way repeats, now that something may have changed."""
        execution = machine.execution
        if execution is None:
            return
        if not execution.planned:
            self._note_starts(execution)
        count = machine.repeats() if self._bulk else 1
        if count != execution.count or not execution.planned:
            execution.count, execution.planned = count, True
            self.agenda.at(execution.end(count), machine.index, self._step_end, machine, execution, count)

    def _note_starts(self, execution: Execution) -> None:
        """A request waits no more once a step first computes it."""
        for piece in execution.run.slices:
            if piece.admit:
                self.front.streams[request_of(piece.rid)].started(execution.started)

    def _step_end(self, machine: Machine, execution: Execution, count: int) -> None:
        if machine.execution is execution and execution.count == count:
            self._complete(machine, self.agenda.now, count)

    def catch_up_one(self, machine: Machine) -> None:
        """Tell of the steps of a bulk that are done; the one under way goes on."""
        execution = machine.execution
        if execution is not None and execution.count > 1:
            count = machine.whole_steps(self.agenda.now)
            if count:
                self._complete(machine, execution.end(count), count)

    def _complete(self, machine: Machine, when: int, count: int) -> None:
        self._ran, event = machine.finish(count)
        machine.start(when)
        self._tell(machine, when, event)
        self._ran = None

    def _plan_tick(self, machine: Machine) -> None:
        deadline = machine.worker.next_deadline()
        if deadline is not None:
            when = max(not_before(deadline), self.agenda.now)
            if machine.tick_at is None or when < machine.tick_at:
                machine.tick_at = when
                self.agenda.at(when, self.rank + 1 + machine.index, self._tick, machine, machine.incarnation, when)

    def _tick(self, machine: Machine, incarnation: int, when: int) -> None:
        if not machine.alive or machine.incarnation != incarnation or machine.tick_at != when:
            return
        machine.tick_at = None
        deadline = machine.worker.next_deadline()
        if deadline is not None and not_before(deadline) <= when:
            self.tell(machine, Tick())
        else:
            self._plan_tick(machine)


def simulate(
    cluster: Sequence[WorkerSpec],
    router: RouterSpec,
    costs: Costs,
    link: Link,
    arrivals: Iterable[Arrival],
    *,
    conditions: Conditions | None = None,
    happenings: Sequence[Happening] = (),
    observer: Observer | None = None,
    bulk: bool = True,
    num_events: int | None = None,
) -> SimResult:
    """Run a workload through a cluster in virtual time. Chance is in the arrivals and conditions, which have seeds."""
    return Simulation(
        cluster, router, costs, link, arrivals,
        conditions=conditions, happenings=happenings, observer=observer, bulk=bulk, num_events=num_events,
    ).run()  # fmt: skip
