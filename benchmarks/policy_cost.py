"""What a decision costs and weighs on the wire as contexts grow: neither may depend on the context's length.

    python benchmarks/policy_cost.py [--contexts 1k,4k,16k,64k,128k] [--batches 1,32] [--out FILE] [--markdown]

Policy objects are driven directly, without processes: a mixed worker; a prefill worker and a decode worker that hand
over to each other (reads end at once); a router with eight workers. Prompts are computed in chunks of 512, then 256
decode steps follow. Times are medians per event. Once per request, and so listed apart, a `Place` carries the prompt's
block hashes and the first `Run` its block table: those grow with the prompt. Not responsible for what drivers add.
"""

import argparse
import gc
import statistics
import sys
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from diptych.bench import rounds
from diptych.journal import POLICY
from diptych.policy.batching import WorkerSpec
from diptych.policy.messages import (
    Answer,
    Done,
    Drop,
    Emit,
    Finish,
    Offer,
    Place,
    Progress,
    Publish,
    Pull,
    Read,
    Reason,
    Role,
    Run,
    StepDone,
    Submitted,
    WorkerUp,
    attempt_id,
)
from diptych.policy.retention import Replicate, Replicated
from diptych.policy.router import Router
from diptych.policy.worker import Worker

BLOCK = 16
CHUNK = 512
NUM_DECODES = 256
NUM_ROUTER_WORKERS = 8
NUM_ROUTED = 50
ONCE = " (once per request)"


@dataclass(slots=True)
class Tally:
    """Microseconds per event and bytes per message, each under a name."""

    us: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    num_bytes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def weigh(self, name: str, message: Any) -> None:
        """Note a message's size on the wire."""
        self.num_bytes[name].append(len(POLICY.encode(message)))


@dataclass(slots=True)
class Probe:
    """A policy object under the stopwatch."""

    policy: Worker
    tally: Tally
    now: float = 0.0
    runs: deque[Run] = field(default_factory=deque)

    def on(self, name: str, event: Any) -> list[Any]:
        """One event; what it orders. Steps ordered are queued in `runs`."""
        self.now += 1e-3
        begin = perf_counter_ns()
        orders = self.policy.on(self.now, event)
        self.tally.us[name].append((perf_counter_ns() - begin) / 1e3)
        self.runs.extend(order for order in orders if isinstance(order, Run))
        return list(orders)

    def step(self, name: str, filled: tuple[tuple[int, bytes], ...] = ()) -> tuple[Run, list[Any]]:
        """Report the oldest step as done: the step, and what was ordered then."""
        run = self.runs.popleft()
        event = StepDone(run.step, 0.01, 1, (), filled)
        self.tally.weigh(f"StepDone {name}", event)
        return run, self.on(f"StepDone {name}", event)


def digests(stem: int, num_tokens: int) -> tuple[bytes, ...]:
    """A hash for each full block, different for each stem."""
    return tuple(stem.to_bytes(8, "big") + i.to_bytes(8, "big") for i in range(num_tokens // BLOCK))


def longest_answer(context: int, batch: int) -> int:
    """So many tokens that nobody is done while others are still being read, and all decode together after that."""
    return 2 * batch * context // CHUNK + NUM_DECODES + 2 * BLOCK


def place(worker: str, request: int, part: Role, peer: str, num_prompt: int, max_new: int) -> Place:
    """A request without a past."""
    hashes = digests(request, num_prompt)
    return Place(worker, attempt_id(request, 0), part, peer, num_prompt, num_prompt, max_new, hashes, 0, request)


def probe(name: str, role: Role, context: int, batch: int, tally: Tally) -> Probe:
    """A worker whose pool holds what it is to hold, and a little more."""
    num_blocks = batch * ((context + longest_answer(context, batch)) // BLOCK + 2)
    return Probe(Worker(WorkerSpec(name, role, num_blocks, BLOCK, CHUNK)), tally)


# --- the scenes ------------------------------------------------------------------------------------------------


def mixed_worker(context: int, batch: int, tally: Tally) -> None:
    """One worker does it all: chunks until every prompt is read, then decodes."""
    worker, max_new = probe("m0", Role.MIXED, context, batch, tally), longest_answer(context, batch)
    for rid in range(batch):
        event = place("m0", rid, Role.MIXED, "", context, max_new)
        tally.weigh(f"Place{ONCE}", event)
        worker.on(f"Place{ONCE}", event)
    num_ready, seen = 0, set[int]()
    while num_ready < batch:
        run, orders = worker.step("prefill")
        first = any(piece.rid not in seen for piece in run.slices)
        seen.update(piece.rid for piece in run.slices)
        tally.weigh(f"Run with a newcomer{ONCE}" if first else "Run prefill", run)
        num_ready += sum(isinstance(order, Emit) and order.first == 0 for order in orders)
    decode({}, worker, "decode", batch)


def decode(probes: dict[str, Probe], worker: Probe, name: str, batch: int) -> None:
    """Steps of one token for each sequence. Blocks become full as they do live; their hashes come with StepDone."""
    worker.step("last prefill")
    for _ in range(NUM_DECODES - 2 * BLOCK):
        run = worker.runs[0]
        full = [piece for piece in run.slices if (piece.start + 1) % BLOCK == 0]
        filled = tuple((piece.rid, (piece.rid << 64 | piece.start).to_bytes(16, "big")) for piece in full)
        _, orders = worker.step(name, filled)
        carry(probes, worker.policy.spec.name, [order for order in orders if isinstance(order, Replicate)])
        assert len(run.slices) == batch
        worker.tally.weigh(f"Run {name}", run)
        for order in orders:
            if isinstance(order, Emit):
                worker.tally.weigh("Emit", order)


def pair(context: int, batch: int, tally: Tally) -> None:
    """A prefill worker and a decode worker: chunks are published and read as they come, then decodes."""
    source, sink = (
        probe("p0", Role.PREFILL, context, batch, tally),
        probe("d0", Role.DECODE, context, batch, tally),
    )
    probes = {"p0": source, "d0": sink}
    for rid in range(batch):
        for worker, role, peer in (("d0", Role.DECODE, "p0"), ("p0", Role.PREFILL, "d0")):
            event = place(worker, rid, role, peer, context, longest_answer(context, batch))
            carry(probes, worker, probes[worker].on(f"Place{ONCE}", event))
    while source.runs:
        _, orders = source.step("prefill")
        carry(probes, "p0", orders)
    assert len(sink.policy.running) == batch, "not everything was handed over"
    for _ in range(4 * batch):  # steps taken while others were still coming
        if len(sink.runs[0].slices) == batch:
            break
        sink.step(f"with newcomers{ONCE}")
    decode(probes, sink, "decode", batch)


def carry(probes: dict[str, Probe], sender: str, orders: list[Any]) -> None:
    """Take orders to whom they are for, and do at once what they order in turn."""
    queue = deque((sender, order) for order in orders)
    while queue:
        sender, order = queue.popleft()
        name = type(order).__name__ + ("" if isinstance(order, Publish | Pull | Replicate | Replicated) else ONCE)
        event: Any
        match order:
            case Publish() | Offer() | Done() | Answer() | Drop() | Replicate() | Replicated():
                probes[sender].tally.weigh(name, order)
                target, event = order.peer, replace(order, peer=sender)
            case Pull(pull=pull):
                probes[sender].tally.weigh(name, order)
                target, name, event = sender, "Read", Read(pull, len(order.target) * 1024, 1e-4)
            case Finish():
                probes[sender].tally.weigh(name, order)
                continue
            case _:
                continue
        queue.extend((target, further) for further in probes[target].on(name, event))


def router(context: int, tally: Tally) -> None:
    """Requests come, make progress and finish; eight pairs' worth of workers to choose from."""
    policy = Router()
    for i in range(NUM_ROUTER_WORKERS):
        role = Role.PREFILL if i % 2 else Role.DECODE
        policy.on(0.0, WorkerUp(f"w{i}", 0, role, 4 * (context // BLOCK + 64), BLOCK))
    now = 0.0
    for request in range(NUM_ROUTED):
        events = routed(policy, request, context)
        for name, event in events:
            now += 1e-3
            begin = perf_counter_ns()
            policy.on(now, event)
            tally.us[f"router {name}"].append((perf_counter_ns() - begin) / 1e3)


def routed(policy: Router, request: int, context: int) -> Iterator[tuple[str, Any]]:
    """What the router hears of one request."""
    yield f"Submitted{ONCE}", Submitted(request, context, 64, digests(request, context))
    view = policy.requests[request]
    yield "Progress", Progress(view.rid)
    yield "Finish", Finish(view.rid, view.prefill, Reason.HANDED_OVER)
    yield "Finish", Finish(view.rid, view.decode, Reason.LENGTH)


# --- all of it -------------------------------------------------------------------------------------------------


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="What decisions cost as contexts grow.")
    parser.add_argument("--contexts", default="1k,4k,16k,64k,128k", help="tokens")
    parser.add_argument("--batches", default="1,32", help="sequences")
    parser.add_argument("--out", type=Path, help="JSON of everything measured")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    arguments = parser.parse_args()
    contexts = [_tokens(text) for text in arguments.contexts.split(",")]
    batches = [int(text) for text in arguments.batches.split(",")]
    about = rounds.environment()
    print(f"commit {about['commit']}, {about['when']}, {about['cpu']}, Python {about['python']}; chunk {CHUNK}")
    results = []
    for scene, run, counts in (("mixed", mixed_worker, batches), ("pair", pair, batches), ("router", None, [1])):
        for batch in counts:
            tallies = {}
            for context in contexts:
                tallies[context] = tally = Tally()
                gc.collect()
                run(context, batch, tally) if run else router(context, tally)
            title = scene if scene == "router" else f"{scene}, batch {batch}"
            _show(title, tallies, arguments.markdown)
            results += [_entry(scene, batch, context, tally) for context, tally in tallies.items()]
    if arguments.out:
        rounds.write_json(arguments.out, {"about": about, "results": results})
    return 0


def _show(title: str, tallies: dict[int, Tally], markdown: bool) -> None:
    header = [title, *(f"{context // 1024}k" for context in tallies)]
    lines = []
    for kind, what in (("us", "µs"), ("num_bytes", "bytes")):
        for name in next(iter(tallies.values())).__getattribute__(kind):
            values = [getattr(tally, kind).get(name) for tally in tallies.values()]
            lines.append([f"{name}, {what}", *(rounds.number(statistics.median(v)) if v else "-" for v in values)])
    rounds.print_table(header, lines, "medians, by tokens of context", markdown)


def _entry(scene: str, batch: int, context: int, tally: Tally) -> dict[str, Any]:
    def summed(values: dict[str, Any]) -> dict[str, Any]:
        return {k: {"num": len(v), "median": statistics.median(v), "max": max(v)} for k, v in values.items()}

    return {
        "scene": scene,
        "batch": batch,
        "context": context,
        "us": summed(tally.us),
        "bytes": summed(tally.num_bytes),
    }


def _tokens(text: str) -> int:
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


if __name__ == "__main__":
    sys.exit(main())
