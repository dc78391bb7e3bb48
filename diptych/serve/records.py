"""What became of each request: its placements, what workers measured of them, and two waterfalls.

Kept by the router for the last requests, in a ring. One waterfall adds up to the time to the first token, the other to
the handover gap, from token 1 to token 2. Nothing here is known to policy, and none of it is text. Not responsible for
counting over requests (`telemetry.py`) nor for who may see this (`api.py`).
"""

import heapq
import statistics
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from diptych.policy.messages import Place, Role, request_of
from diptych.serve.account import MAX_NOTED, STALL_S, Account, Prefilled, Received, Stalled
from diptych.serve.frontend import Label
from diptych.serve.telemetry import Telemetry
from diptych.serve.waterfall import micros, waterfall
from diptych.serve.wire import Note

NUM_KEPT = 4096
MAX_SHOWN = 256  # as many as one HTTP request can be
MAX_STALLS = 16  # the longest
STALL_FACTOR = 4  # times the median gap
EXPOSED = ("memory", "transfer", "answer")  # the parts of a handover gap in which KV was waited for


@dataclass(slots=True)
class Attempt:
    """One placement. Times are the router's clock; `first`: the number of the first token it is to write."""

    rid: int
    placed: float
    first: int
    prefill: str = ""  # the worker that computes the prompt
    decode: str = ""  # the worker that goes on; "" where that is the same one
    first_at: float | None = None
    second_at: float | None = None
    gap_s: float | None = None  # from the last token before it, where there is one
    prefilled: Prefilled | None = None
    received: Received | None = None
    gave_up: str = ""

    def prefilling(self) -> list[tuple[str, float]]:
        """What its worker accounts for until its first token."""
        known = self.prefilled
        return [("queue", known.queue_s), ("prefill", known.prefill_s)] if known else []

    def handover(self) -> dict[str, Any] | None:
        """The waterfall from its first token to its second, where they come from two workers."""
        if not self.decode or self.first_at is None or self.second_at is None:
            return None
        return waterfall(self.second_at - self.first_at, self.received.phases if self.received else ())

    def transfer(self) -> dict[str, Any] | None:
        """How its KV came, and how long it was waited for."""
        known = self.received
        if known is None:
            return None
        gap = self.handover()
        return {
            "source": known.source,
            "target": self.decode,
            "lane": known.lane,
            "codec": known.codec,
            "why": known.why,
            "bytes": known.num_bytes,
            "reads": known.num_reads,
            "failed": known.num_failed,
            "us": micros(known.read_s),
            "gb_per_s": round(known.num_bytes / known.read_s / 1e9, 4) if known.read_s else None,
            "hidden_us": micros(known.hidden_s),
            "exposed_us": exposed(gap) if gap else None,
        }

    def view(self) -> dict[str, Any]:
        """As it is shown."""
        known = self.prefilled
        worked = {} if known is None else {
            "queue_us": micros(known.queue_s),
            "prefill_us": micros(known.prefill_s),
            "computed_tokens": known.num_computed,
            "cached_tokens": known.num_cached,
            "steps": known.num_steps,
        }  # fmt: skip
        ended = {"gave_up": self.gave_up} if self.gave_up else {}
        return {
            "attempt": self.rid,
            "prefill": self.prefill,
            "decode": self.decode,
            "from_token": self.first,
            **worked,
            **ended,
        }


def exposed(gap: dict[str, Any]) -> int:
    """Microseconds of a handover gap in which KV was waited for."""
    return sum(gap["parts"].get(name, 0) for name in EXPOSED)


@dataclass(slots=True)
class Record:
    """One request. `gaps`: seconds between tokens as they were delivered, while it is open."""

    number: int
    label: Label
    num_prompt: int
    max_new: int
    submitted: float
    state: str = "running"
    why: str = ""
    num_written: int = 0
    last: float = 0.0  # when the last token was delivered
    ended: float | None = None
    attempts: list[Attempt] = field(default_factory=list)
    gaps: "array[float]" = field(default_factory=lambda: array("f"))
    causes: dict[int, str] = field(default_factory=dict)  # of late tokens, by number, as workers say
    stalls: list[tuple[int, float]] = field(default_factory=list)  # (token, gap), once it is over
    median_s: float = 0.0
    note: Note | None = None

    @property
    def name(self) -> str:
        """What log lines call it."""
        return self.label.name or f"request-{self.number}"

    def place(self, now: float, order: Place) -> None:
        """The router gives it to a worker; a pair hears of it one after the other."""
        if not self.attempts or self.attempts[-1].rid != order.rid:
            self.attempts.append(Attempt(order.rid, now, self.num_written))
        attempt = self.attempts[-1]
        if order.part == Role.DECODE:
            attempt.decode = order.worker
        else:
            attempt.prefill = order.worker

    def wrote(self, now: float, count: int) -> None:
        """Further tokens were delivered, together."""
        if self.num_written:
            self.gaps.append(now - self.last)
        for _ in range(count - 1):
            self.gaps.append(0.0)
        self.num_written += count
        self.last = now

    def account(self, worker: str, said: Account) -> None:
        """A worker says what it measured of one of the attempts; of other people's parts nothing is believed."""
        attempt = next((attempt for attempt in self.attempts if attempt.rid == said.rid), None)
        if attempt is None or worker not in (attempt.prefill, attempt.decode):
            return
        match said:
            case Stalled(causes=causes):
                self.causes.update(causes[: MAX_NOTED - len(self.causes)])
            case Prefilled() if worker == attempt.prefill:
                attempt.prefilled = said
            case Received(source=source) if worker == attempt.decode and source == attempt.prefill:
                attempt.received = said

    def end(self, now: float, state: str, why: str = "") -> None:
        """It is over, and how."""
        self.state, self.why, self.ended = state, why, now
        self.stalls, self.median_s = self._stalls()
        self.gaps = array("f")

    def _stalls(self) -> tuple[list[tuple[int, float]], float]:
        """The longest gaps that stand out, by the number of the token that came late; and the median of all gaps."""
        if not self.gaps:
            return self.stalls, self.median_s
        median = statistics.median(self.gaps)
        least = max(STALL_S, STALL_FACTOR * median)
        late = heapq.nlargest(MAX_STALLS, ((gap, i + 1) for i, gap in enumerate(self.gaps) if gap > least))
        return sorted((token, gap) for gap, token in late), median

    # --- showing -------------------------------------------------------------------------------------------------

    def view(self, now: float) -> dict[str, Any]:
        """As it is shown; times in whole microseconds."""
        stalls, median = self._stalls()
        handed = next((attempt for attempt in self.attempts if attempt.handover()), None)
        cached = next((attempt.prefilled.num_cached for attempt in self.attempts if attempt.prefilled), 0)
        return {
            "id": self.label.ident or f"request-{self.number}",
            "request_id": self.label.caller,
            "index": self.label.index,
            "age_s": round(now - self.submitted, 3),
            "state": self.state,
            **({"why": self.why} if self.why else {}),
            "finish": self.note.finish if self.note else None,
            "prompt_tokens": self.num_prompt,
            "cached_tokens": cached,
            "output_tokens": self.num_written,
            "e2e_us": micros((now if self.ended is None else self.ended) - self.submitted),
            "ttft": self.ttft(),
            "handover": handed.handover() if handed else None,
            "transfer": handed.transfer() if handed else None,
            "attempts": [attempt.view() for attempt in self.attempts],
            "failovers": list(self._failovers()),
            "median_gap_us": micros(median),
            "stalls": [{"token": n, "us": micros(gap), "cause": self._cause(n)} for n, gap in stalls],
        }

    def ttft(self) -> dict[str, Any] | None:
        """The waterfall until the first token: as the client sees it, and before the API process has said, as we do."""
        first = next((attempt for attempt in self.attempts if attempt.first_at is not None), None)
        if first is None or first.first_at is None:
            return None
        begun = self.attempts[0].placed
        ours = [("place", begun - self.submitted), ("retry", first.placed - begun), *first.prefilling()]
        ours = [part for part in ours if part[0] != "retry" or len(self.attempts) > 1]
        note = self.note
        if note is None or not note.ttft_s:
            return {"seen_by": "router", **waterfall(first.first_at - self.submitted, ours)}
        waited = [("leader", note.leader_s)] if note.leader_s else []
        return {"seen_by": "api", **waterfall(note.ttft_s, [("api", note.api_s), *waited, *ours, ("out", note.out_s)])}

    def _failovers(self) -> Iterable[dict[str, Any]]:
        """Each attempt that was given up, and the gap in the stream that came of it, if the next one filled it."""
        for before, after in zip(self.attempts, self.attempts[1:], strict=False):
            gap = None
            if after.gap_s is not None and after.first_at is not None:
                lost = after.gap_s - (after.first_at - after.placed)
                gap = waterfall(after.gap_s, [("lost", lost), *after.prefilling()])
            yield {"reason": before.gave_up, "token": after.first, "resume": gap}

    def _cause(self, token: int) -> str:
        """Why a token came late: it was the first after a failover, or came over, or what a worker noted."""
        for attempt in self.attempts[1:]:
            if token == attempt.first:
                return "failover"
        for attempt in self.attempts:
            if attempt.decode and token == attempt.first + 1:
                return "handover"
        return self.causes.get(token, "unknown")


class Records:
    """The last requests, found by the ids that their clients know. What is counted goes to `telemetry`."""

    def __init__(self, telemetry: Telemetry | None = None, num_kept: int = NUM_KEPT):
        self.telemetry = telemetry or Telemetry()
        self._num_kept = num_kept
        self._by_number: OrderedDict[int, Record] = OrderedDict()
        self._by_name: defaultdict[str, dict[int, None]] = defaultdict(dict)

    def open(self, now: float, number: int, label: Label, num_prompt: int, max_new: int) -> Record:
        """A request was handed in."""
        record = self._by_number[number] = Record(number, label, num_prompt, max_new, now)
        for name in self._names(record):
            self._by_name[name][number] = None
        if len(self._by_number) > self._num_kept:
            self._forget(self._by_number.popitem(last=False)[1])
        return record

    def _forget(self, record: Record) -> None:
        for name in self._names(record):
            del self._by_name[name][record.number]
            if not self._by_name[name]:
                del self._by_name[name]

    @staticmethod
    def _names(record: Record) -> set[str]:
        return {record.label.ident or f"request-{record.number}", record.label.caller} - {""}

    def placed(self, now: float, record: Record, order: Place, reason: str) -> None:
        """It goes to a worker; `reason`: why an earlier attempt was given up, if one was."""
        if record.attempts and record.attempts[-1].rid != order.rid:
            record.attempts[-1].gave_up = reason
            self.telemetry.failed_over(reason)
        record.place(now, order)

    def wrote(self, now: float, record: Record, count: int) -> None:
        """Tokens of its present attempt were delivered."""
        attempt = record.attempts[-1]
        if attempt.second_at is None:
            self._began(now, record, attempt, count)
        record.wrote(now, count)

    def _began(self, now: float, record: Record, attempt: Attempt, count: int) -> None:
        """The first or the second token of an attempt: what the waterfalls end with."""
        if attempt.first_at is None:
            attempt.first_at = now
            if record.num_written:
                attempt.gap_s = now - record.last
                self.telemetry.resumed(attempt.gap_s)
            if count == 1:
                return
        attempt.second_at = now
        gap = attempt.handover()
        if gap is not None and attempt.received is not None:
            self.telemetry.handed_over(record.name, attempt.decode, attempt.received, gap, exposed(gap))

    def accounted(self, worker: str, said: Account) -> None:
        """A worker says what it measured; also of requests that are over."""
        record = self._by_number.get(request_of(said.rid))
        if record is None:
            return
        known = record.attempts[0].prefilled if record.attempts else None
        record.account(worker, said)
        if known is None and record.attempts and (made := record.attempts[0].prefilled):
            self.telemetry.prefilled(made.queue_s, made.prefill_s)

    def noted(self, note: Note) -> None:
        """An API process says how its client saw it."""
        for number in self._by_name.get(note.ident, ()):
            if self._by_number[number].label.index == note.index:
                self._by_number[number].note = note

    def find(self, now: float, name: str) -> list[dict[str, Any]]:
        """The requests of a response id or an X-Request-Id, in order; the last ones where there are very many."""
        numbers = list(self._by_name.get(name, ()))[-MAX_SHOWN:]
        return [self._by_number[number].view(now) for number in numbers]

    def latest(self, now: float, limit: int) -> list[dict[str, Any]]:
        """The last requests, newest first."""
        newest = [record for record, _ in zip(reversed(self._by_number.values()), range(limit), strict=False)]
        return [record.view(now) for record in newest]
