"""The router's every decision: who is admitted, and which worker, or pair of workers, gets a request.

A request whose worker is lost, or whose pair breaks, is placed anew with the tokens its client already has counted as
known, on another pair if there is one. Pairs without a connection (`links.py`) and workers that drain (`drains.py`) get
nothing. Where no pair is up, whoever is up does both parts. Load is the router's own book-keeping of what it placed, so
that nothing has to be reported per step.

Not responsible for who is the best choice (`placement.py`), for queues on workers, for moving KV, or for knowing any
text.
"""

from collections.abc import Callable

from diptych.policy.books import RequestView, RouterSpec, WorkerView
from diptych.policy.drains import Drains
from diptych.policy.handover import Handovers
from diptych.policy.ladder import REQUEST, Ladder, Rung
from diptych.policy.links import Links
from diptych.policy.membership import Dismiss, Drain, Drained, LinkDown, LinkMeasured, LinkUp
from diptych.policy.messages import (
    MAX_ATTEMPTS,
    WELL,
    Cancel,
    Cancelled,
    Failed,
    Finish,
    Place,
    Progress,
    Reason,
    Reject,
    Role,
    RouterEvent,
    RouterOrder,
    Submitted,
    Tick,
    WorkerLost,
    WorkerUp,
    request_of,
)
from diptych.policy.placement import Placement


class Router:
    """The policy of the router. Feed it events in order; do what it orders, in order."""

    def __init__(self, spec: RouterSpec | None = None):
        self.spec = spec or RouterSpec()
        self.workers: dict[str, WorkerView] = {}
        self.requests: dict[int, RequestView] = {}
        self.num: dict[str, int] = dict.fromkeys(("submitted", "finished", "rejected", "cancelled", "failed"), 0)
        self.links = Links()
        self.handovers = Handovers()
        self.drains = Drains()
        self.placement = Placement(self.spec, self.workers, self.links, self.handovers, self.drains)
        self._clock = 0  # counts placements, for ages and for turns
        self._orders: list[RouterOrder] = []

    def on(self, now: float, event: RouterEvent) -> list[RouterOrder]:
        """Take in one event; returns what is to be done about it, in order."""
        match event:
            case Submitted():
                self._submit(now, event)
            case Progress(rid=rid):
                self._progress(now, rid)
            case Finish():
                self._finished(now, event)
            case Cancelled(request=request):
                self._cancel(now, request)
            case Failed():
                self._failed(now, event)
            case WorkerUp():
                self.workers[event.worker] = WorkerView(
                    event.worker, event.role, event.num_blocks, event.block_size, event.token_bytes
                )
            case WorkerLost():
                self._worker_lost(now, event)
            case LinkDown(worker=worker, peer=peer):
                self.links.down(worker, peer)
            case LinkUp(worker=worker, peer=peer):
                self.links.up(worker, peer)
                self._forgive(lambda pair: {worker, peer} == set(pair))
            case LinkMeasured():
                self.handovers.measured(event)
            case Drain(worker=worker) if worker in self.workers:
                self.drains.begin(worker, now + event.timeout_s)
            case Drained(worker=worker) if worker in self.drains:
                self._orders.append(Dismiss(worker))
            case Tick():
                self._orders += self.drains.expire(now)
        if self.drains:
            self._orders += self.drains.proceed(lambda worker: self.workers[worker].num_requests == 0)
        orders, self._orders = self._orders, []
        return orders

    def next_deadline(self) -> float | None:
        """When a worker that drains has had its time."""
        return self.drains.next_deadline()

    def num_paths(self) -> int:
        """Ways a new request can go (`Placement.num_paths`)."""
        return self.placement.num_paths()

    def serves(self) -> bool:
        """New requests are taken, if only by workers that stand in for others."""
        return bool(self.placement.able(tuple(Role)))

    def needs(self, worker: str) -> bool:
        """No other worker of its kind would take new requests if this one did not."""
        return not any(view.name != worker for view in self.placement.able((self.workers[worker].role,)))

    # --- coming in -----------------------------------------------------------------------------------------------

    def _submit(self, now: float, event: Submitted) -> None:
        self.num["submitted"] += 1
        self._clock += 1
        request = RequestView(event, self._clock, Ladder(REQUEST, Rung.QUEUED, now))
        if len(self.requests) >= self.spec.max_requests:
            self._reject(now, request, 429, f"{len(self.requests)} requests are in flight; try again later")
            return
        queued, most = sum(view.prompt_tokens for view in self.workers.values()), self.spec.max_queued_tokens
        if most is not None and queued and queued + event.num_prompt > most:
            self._reject(now, request, 429, f"{queued} prompt tokens are queued; try again later")
            return
        self.requests[event.request] = request
        self._place(now, request, event.num_prompt)

    def _place(self, now: float, request: RequestView, num_tokens: int) -> None:
        """Choose a mixed worker or a pair, and tell them. What writes nothing needs only one that computes prompts."""
        wanted = request.submitted
        writes = wanted.max_new > 0
        need = wanted.num_prompt + wanted.max_new - writes  # the last token's KV is never written
        choose = self.placement
        alone = choose.pick(request, choose.able((Role.MIXED,) if writes else (Role.MIXED, Role.PREFILL), need))
        request.ranked = []
        pair = choose.pair(request, num_tokens, need) if writes else None
        kept = pair is not None and pair[0].name == request.keeper
        if alone and not kept and (not pair or not choose.disaggregates(request, alone)):
            self._send(request, num_tokens, alone, Role.MIXED if writes else Role.PREFILL, None)
            request.ranked = []
            self._charge(now, request, alone, alone if writes else None, num_tokens)
        elif pair:
            prefill, decode = pair
            self._send(request, num_tokens, decode, Role.DECODE, prefill)
            self._send(request, num_tokens, prefill, Role.PREFILL, decode)
            self._charge(now, request, prefill, decode, num_tokens)
        elif writes and (stand_in := choose.stand_in(request, need)):
            self._send(request, num_tokens, stand_in, Role.MIXED, None)
            self._charge(now, request, stand_in, stand_in, num_tokens)
        elif self.num_paths():
            status = 503 if request.attempt else 400  # it did fit once: what is left of the cluster is too small
            self._reject(
                now,
                request,
                status,
                f"{need + writes} tokens (prompt and answer) do not fit into any worker's KV memory",
            )
        else:
            self._reject(now, request, 503, "no worker is up; try again later")

    def _send(self, request: RequestView, num_tokens: int, to: WorkerView, part: Role, peer: WorkerView | None) -> None:
        wanted = request.submitted
        self._orders.append(
            Place(
                worker=to.name,
                rid=request.rid,
                part=part,
                peer=peer.name if peer else "",
                num_prompt=wanted.num_prompt,
                num_tokens=num_tokens,
                max_new=wanted.max_new,
                hashes=wanted.hashes,
                priority=wanted.priority,
                order=request.order,
            )
        )

    def _charge(
        self, now: float, request: RequestView, prefill: WorkerView, decode: WorkerView | None, num_tokens: int
    ) -> None:
        """Enter a placement into the books."""
        wanted = request.submitted
        request.prefill = request.keeper = prefill.name if prefill is not decode else ""
        request.decode = decode.name if decode else ""
        request.charged = prefill.name
        request.uncached = max(num_tokens - prefill.matched(wanted.hashes), 1)
        request.alone_since = None if prefill.prompt_tokens else now
        prefill.prompt_tokens += request.uncached
        for view in (prefill,) if decode in (prefill, None) else (prefill, decode):
            self._clock += 1
            view.last_placed = self._clock
            view.num_requests += 1
            view.remember(wanted.hashes)
        if decode:
            decode.held_tokens += wanted.num_prompt + wanted.max_new

    # --- going on ------------------------------------------------------------------------------------------------

    def _progress(self, now: float, rid: int) -> None:
        request = self._present(rid)
        if request is not None:
            if request.alone_since is not None and request.prefill:
                self.handovers.computed(request.uncached, now - request.alone_since)
            self._prefilled(request)
            request.life.climb(Rung.PREFILLING, now)
            request.life.climb(Rung.HANDOVER if request.prefill else Rung.DECODING, now)

    def _finished(self, now: float, event: Finish) -> None:
        """A worker is through with an attempt; the request is over if that is how it ended, not by handing over."""
        request = self._present(event.rid)
        if request is None:
            return
        if event.worker == request.prefill and event.reason in (Reason.HANDED_OVER, Reason.EXPIRED):
            self._release(request.prefill, 0)
            request.prefill = ""
        elif event.reason in WELL:
            if (
                event.worker == request.prefill and request.decode
            ):  # over with its first token: the decode side waits for nothing
                self._orders.append(Cancel(request.decode, request.rid))
            self._prefilled(request)
            self._close(now, request, "finished", Rung.FINISHED)

    def _cancel(self, now: float, number: int) -> None:
        request = self.requests.get(number)
        if request is not None:
            self._orders += self._withdraw(request)
            self._close(now, request, "cancelled", Rung.CANCELLED)

    def _failed(self, now: float, event: Failed) -> None:
        request = self._present(event.rid)
        if request is not None:
            request.failed.add((request.prefill, request.decode))
            self._again(now, request, event.num_emitted, f"{event.worker} gave it up: {event.reason}")

    def _worker_lost(self, now: float, event: WorkerLost) -> None:
        """Everything that was decoding there, or not yet past its first token there, is placed anew."""
        self.workers.pop(event.worker, None)
        self.links.forget(event.worker)
        self.handovers.forget(event.worker)
        self.drains.forget(event.worker)
        self._forgive(lambda pair: event.worker in pair)  # whoever comes under that name has failed nobody
        emitted = dict(event.emitted)
        for request in list(self.requests.values()):
            if request.keeper == event.worker:
                request.keeper = ""  # what it kept is gone, whoever comes back under that name
            mine = request.decode == event.worker
            if mine or (request.prefill == event.worker and request.life.at not in (Rung.HANDOVER, Rung.DECODING)):
                self._again(now, request, emitted.get(request.rid, 0), f"{event.worker} was lost")
            elif request.prefill == event.worker:
                request.prefill = ""  # the decode side has it all, computes it, or says Failed

    def _again(self, now: float, request: RequestView, num_emitted: int, why: str) -> None:
        """Place it anew. Who had the earlier attempt hears of the new one first, so that it keeps what it computed."""
        cancels = self._withdraw(request)
        if request.attempt + 1 >= MAX_ATTEMPTS:
            self._reject(now, request, 503, f"given up after {MAX_ATTEMPTS} attempts: {why}")
        else:
            request.attempt += 1
            request.life.climb(Rung.RESUMING, now)
            self._place(now, request, request.submitted.num_prompt + num_emitted)
        self._orders += cancels

    def _forgive(self, whom: Callable[[tuple[str, str]], bool]) -> None:
        """What went wrong between these is over."""
        for request in self.requests.values():
            if request.failed:
                request.failed = {pair for pair in request.failed if not whom(pair)}

    # --- book-keeping --------------------------------------------------------------------------------------------

    def _present(self, rid: int) -> RequestView | None:
        """The request, if that is its present attempt."""
        request = self.requests.get(request_of(rid))
        return request if request is not None and request.rid == rid else None

    def _withdraw(self, request: RequestView) -> list[RouterOrder]:
        """Take the present attempt out of the books; returns what takes it back from whoever has it."""
        holders = dict.fromkeys((request.prefill, request.decode))
        cancels: list[RouterOrder] = [Cancel(name, request.rid) for name in holders if name in self.workers]
        self._prefilled(request)
        self._settle(request)
        return cancels

    def _prefilled(self, request: RequestView) -> None:
        if request.charged in self.workers:
            self.workers[request.charged].prompt_tokens -= request.uncached
        request.charged = ""

    def _settle(self, request: RequestView) -> None:
        self._release(request.prefill, 0)
        self._release(request.decode, request.submitted.num_prompt + request.submitted.max_new)
        request.prefill = request.decode = ""

    def _release(self, worker: str, held_tokens: int) -> None:
        view = self.workers.get(worker)
        if view is not None:
            view.num_requests -= 1
            view.held_tokens -= held_tokens

    def _close(self, now: float, request: RequestView, how: str, rung: Rung) -> None:
        self._settle(request)
        request.life.climb(rung, now)
        self.num[how] += 1
        del self.requests[request.submitted.request]

    def _reject(self, now: float, request: RequestView, status: int, why: str) -> None:
        began = request.attempt > 0
        self.requests.pop(request.submitted.request, None)
        request.life.climb(Rung.FAILED if began else Rung.REJECTED, now)
        self.num["failed" if began else "rejected"] += 1
        self._orders.append(Reject(request.submitted.request, status, why))
