"""The router's every decision: who is admitted, and which worker, or pair of workers, gets a request.

filter -> score -> pick, for prefill and for decode: candidates that can hold the request, a score for each by the
chosen policy (round robin, least loaded, prefix-aware), and the lowest score wins. Where both mixed workers and pairs
exist, `disaggregates` decides per request.

A request whose worker is lost, or whose pair breaks, is placed anew with the tokens its client already has counted as
known. Load is the router's own book-keeping of what it placed, so that nothing has to be reported per step.

Not responsible for queues on workers, for moving KV, or for knowing any text.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from diptych.policy.ladder import REQUEST, Ladder, Rung
from diptych.policy.messages import (
    MAX_ATTEMPTS,
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
    attempt_id,
    request_of,
)

PolicyName = Literal["round-robin", "least-loaded", "prefix-aware"]


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """policy: how workers are scored. max_requests: in flight at most; more are refused with 429.

    disaggregate_above: in a mixture, prompts with more uncached tokens than this go to a pair. max_queued_tokens: most
    prompt tokens that wait to be computed; a prompt that would exceed it, and is not alone, is refused with 429.
    """

    policy: PolicyName = "prefix-aware"
    max_requests: int = 4096
    disaggregate_above: int = 256
    max_queued_tokens: int | None = None


@dataclass(slots=True)
class WorkerView:
    """What the router knows of a worker, and has given it to do."""

    name: str
    role: Role
    num_blocks: int
    block_size: int
    prompt_tokens: int = 0  # placed here and not prefilled yet
    held_tokens: int = 0  # at most held by what decodes here
    num_requests: int = 0
    last_placed: int = 0
    prefixes: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # hashes likely in its cache, LRU

    def fits(self, num_tokens: int) -> bool:
        """Its whole pool could hold that many tokens."""
        return -(-num_tokens // self.block_size) <= self.num_blocks

    def matched(self, hashes: tuple[bytes, ...]) -> int:
        """Tokens of the longest prefix it probably holds."""
        count = 0
        for digest in hashes:
            if digest not in self.prefixes:
                break
            count += 1
        return count * self.block_size

    def remember(self, hashes: tuple[bytes, ...]) -> None:
        """It will hold these blocks; forget as many of the oldest as it cannot hold."""
        for digest in hashes:
            self.prefixes[digest] = None
            self.prefixes.move_to_end(digest)
        while len(self.prefixes) > self.num_blocks:
            self.prefixes.popitem(last=False)


@dataclass(slots=True)
class RequestView:
    """A request in flight: where it is, and as which attempt."""

    submitted: Submitted
    order: int
    life: Ladder[Rung]
    attempt: int = 0
    prefill: str = ""  # the worker that computes the prompt; "" once that is over or for a mixed worker
    decode: str = ""  # the worker that writes the answer
    uncached: int = 0  # prompt tokens charged to the prefilling worker until the first token
    charged: str = ""  # that worker

    @property
    def rid(self) -> int:
        """Its present attempt."""
        return attempt_id(self.submitted.request, self.attempt)


Score = Callable[[WorkerView, RequestView], tuple[float, ...]]


def round_robin(view: WorkerView, request: RequestView) -> tuple[float, ...]:
    """Whoever was given nothing for longest."""
    return (view.last_placed,)


def least_loaded(view: WorkerView, request: RequestView) -> tuple[float, ...]:
    """Least outstanding work: prompt tokens to compute, then share of the pool in use."""
    return (
        view.prompt_tokens + view.held_tokens / (view.num_blocks * view.block_size),
        view.num_requests,
        view.last_placed,
    )


def prefix_aware(view: WorkerView, request: RequestView) -> tuple[float, ...]:
    """Least outstanding work counting this request's own, less what the worker already holds of it."""
    mine = request.submitted.num_prompt - view.matched(request.submitted.hashes)
    return (mine + view.prompt_tokens + view.held_tokens / 16, view.num_requests, view.last_placed)


SCORES: dict[PolicyName, Score] = {
    "round-robin": round_robin,
    "least-loaded": least_loaded,
    "prefix-aware": prefix_aware,
}


class Router:
    """The policy of the router. Feed it events in order; do what it orders, in order."""

    def __init__(self, spec: RouterSpec | None = None):
        self.spec = spec or RouterSpec()
        self.workers: dict[str, WorkerView] = {}
        self.requests: dict[int, RequestView] = {}
        self.num: dict[str, int] = dict.fromkeys(("submitted", "finished", "rejected", "cancelled", "failed"), 0)
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
                self.workers[event.worker] = WorkerView(event.worker, event.role, event.num_blocks, event.block_size)
            case WorkerLost():
                self._worker_lost(now, event)
            case Tick():
                pass
        orders, self._orders = self._orders, []
        return orders

    def next_deadline(self) -> float | None:
        """The router waits for nothing but events."""
        return None

    def num_paths(self) -> int:
        """Ways a request can go: mixed workers, and pairs of a prefill and a decode worker."""
        count = {role: sum(view.role == role for view in self.workers.values()) for role in Role}
        return count[Role.MIXED] + count[Role.PREFILL] * count[Role.DECODE]

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
        """Choose a mixed worker or a pair, and tell them."""
        wanted = request.submitted
        need = wanted.num_prompt + wanted.max_new
        mixed = self._pick(request, Role.MIXED, need)
        decode = self._pick(request, Role.DECODE, need)
        prefill = self._pick(request, Role.PREFILL, num_tokens) if decode else None
        if mixed and (not prefill or not self._disaggregates(request, mixed)):
            self._send(request, num_tokens, mixed, Role.MIXED, None)
            self._charge(request, mixed, mixed, num_tokens)
        elif prefill and decode:
            self._send(request, num_tokens, decode, Role.DECODE, prefill)
            self._send(request, num_tokens, prefill, Role.PREFILL, decode)
            self._charge(request, prefill, decode, num_tokens)
        elif self.num_paths():
            status = 503 if request.attempt else 400  # it did fit once: what is left of the cluster is too small
            self._reject(
                now, request, status, f"{need} tokens (prompt and answer) do not fit into any worker's KV memory"
            )
        else:
            self._reject(now, request, 503, "no worker is up; try again later")

    def _pick(self, request: RequestView, role: Role, num_tokens: int) -> WorkerView | None:
        able = [view for view in self.workers.values() if view.role == role and view.fits(num_tokens)]
        return min(able, key=lambda view: SCORES[self.spec.policy](view, request), default=None)

    def _disaggregates(self, request: RequestView, mixed: WorkerView) -> bool:
        """Is a pair worth its handover for this request? Only if there is enough prompt to compute."""
        uncached = request.submitted.num_prompt - mixed.matched(request.submitted.hashes)
        return uncached > self.spec.disaggregate_above

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

    def _charge(self, request: RequestView, prefill: WorkerView, decode: WorkerView, num_tokens: int) -> None:
        """Enter a placement into the books."""
        wanted = request.submitted
        request.prefill = prefill.name if prefill is not decode else ""
        request.decode = decode.name
        request.charged = prefill.name
        request.uncached = max(num_tokens - prefill.matched(wanted.hashes), 1)
        prefill.prompt_tokens += request.uncached
        for view in {prefill.name: prefill, decode.name: decode}.values():
            self._clock += 1
            view.last_placed = self._clock
            view.num_requests += 1
            view.remember(wanted.hashes)
        decode.held_tokens += wanted.num_prompt + wanted.max_new

    # --- going on ------------------------------------------------------------------------------------------------

    def _progress(self, now: float, rid: int) -> None:
        request = self._present(rid)
        if request is not None:
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
        elif event.reason in (Reason.STOP, Reason.LENGTH):
            if event.worker == request.prefill:  # over with its first token: the decode side waits for nothing
                self._orders.append(Cancel(request.decode, request.rid))
            self._prefilled(request)
            self._close(now, request, "finished", Rung.FINISHED)

    def _cancel(self, now: float, number: int) -> None:
        request = self.requests.get(number)
        if request is not None:
            self._withdraw(request)
            self._close(now, request, "cancelled", Rung.CANCELLED)

    def _failed(self, now: float, event: Failed) -> None:
        request = self._present(event.rid)
        if request is not None:
            self._again(now, request, event.num_emitted, f"{event.worker} gave it up: {event.reason}")

    def _worker_lost(self, now: float, event: WorkerLost) -> None:
        """Everything that was decoding there, or not yet past its first token there, is placed anew."""
        self.workers.pop(event.worker, None)
        emitted = dict(event.emitted)
        for request in list(self.requests.values()):
            mine = request.decode == event.worker
            if mine or (request.prefill == event.worker and request.life.at not in (Rung.HANDOVER, Rung.DECODING)):
                self._again(now, request, emitted.get(request.rid, 0), f"{event.worker} was lost")
            elif request.prefill == event.worker:
                request.prefill = ""  # the decode side has it all, computes it, or says Failed

    def _again(self, now: float, request: RequestView, num_emitted: int, why: str) -> None:
        self._withdraw(request)
        if request.attempt + 1 >= MAX_ATTEMPTS:
            self._reject(now, request, 503, f"given up after {MAX_ATTEMPTS} attempts: {why}")
            return
        request.attempt += 1
        request.life.climb(Rung.RESUMING, now)
        self._place(now, request, request.submitted.num_prompt + num_emitted)

    # --- book-keeping --------------------------------------------------------------------------------------------

    def _present(self, rid: int) -> RequestView | None:
        """The request, if that is its present attempt."""
        request = self.requests.get(request_of(rid))
        return request if request is not None and request.rid == rid else None

    def _withdraw(self, request: RequestView) -> None:
        """Take the present attempt back from whoever has it, and out of the books."""
        for name in dict.fromkeys((request.prefill, request.decode)):
            if name in self.workers:
                self._orders.append(Cancel(name, request.rid))
        self._prefilled(request)
        self._settle(request)

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
