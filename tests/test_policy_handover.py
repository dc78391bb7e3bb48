"""Where links count: what a worker says of them, what the router makes of it, and how it explains itself."""

import pytest

from diptych.linkrates import LinkRates, LinkRule
from diptych.policy.batching import WorkerSpec
from diptych.policy.books import RouterSpec
from diptych.policy.handover import AGAIN_S, MIN_BYTES, Handovers, Meter
from diptych.policy.membership import LinkMeasured
from diptych.policy.messages import Place, Progress, Role, Submitted, WorkerLost, WorkerUp, attempt_id
from diptych.policy.router import Router
from diptych.sim.costs import Costs, Link, StepCost
from diptych.sim.driver import simulate
from diptych.sim.workload import Arrival

MB = 1 << 20


# --- measuring -------------------------------------------------------------------------------------------------------


def test_a_rate_is_said_when_it_is_new_and_when_it_has_changed() -> None:
    meter = Meter("d0")
    assert meter.read(0.0, "p0", MB, 0.001) == [LinkMeasured("d0", "p0", MB / 0.001)]
    assert meter.read(5.0, "p0", MB, 0.0011) == []
    assert meter.read(6.0, "p1", MB, 0.001) == [LinkMeasured("d0", "p1", MB / 0.001)]
    said = [meter.read(10.0 + i / 10, "p0", MB, 0.1) for i in range(10)]
    assert [len(messages) for messages in said].index(1) == 0 and sum(map(len, said)) == 1, "once in a while only"
    (late,) = meter.read(10.0 + AGAIN_S, "p0", MB, 0.1)
    assert MB / 0.1 < late.bytes_per_s < MB / 0.01


def test_small_reads_say_nothing_of_a_link() -> None:
    assert Meter("d0").read(0.0, "p0", MIN_BYTES - 1, 1e-6) == [] == Meter("d0").read(0.0, "p0", MB, 0.0)


def test_a_new_connection_is_measured_anew() -> None:
    meter = Meter("d0")
    meter.read(0.0, "p0", MB, 0.001)
    meter.forget("p0")
    assert meter.read(0.1, "p0", MB, 0.001)


# --- predicting ------------------------------------------------------------------------------------------------------


def test_a_link_that_nobody_measured_counts_as_fast() -> None:
    handovers = Handovers()
    handovers.measured(LinkMeasured("d0", "p0", 1e6))
    assert not handovers.known(), "seconds are worth nothing as long as nobody knows the pace"
    handovers.computed(1000, 0.1)
    assert handovers.known() and handovers.tokens_per_s == pytest.approx(10_000)
    assert handovers.seconds(MB, "p0", "d0") == MB / 1e6 and handovers.seconds(MB, "p1", "d0") == 0.0
    assert handovers.least_seconds(MB, "d0", num_sources=1) == MB / 1e6
    assert handovers.least_seconds(MB, "d0", num_sources=2) == 0.0, "the other source may be fast"
    handovers.measured(LinkMeasured("d0", "p1", 4e6))
    assert handovers.least_seconds(MB, "d0", num_sources=2) == MB / 4e6
    handovers.forget("p1")
    assert handovers.least_seconds(MB, "d0", num_sources=1) == MB / 1e6
    handovers.forget("d0")
    assert not handovers.known()


def test_what_hardly_differs_is_not_worth_choosing_for() -> None:
    handovers = Handovers()
    handovers.computed(1000, 0.1)
    assert handovers.detour(0.001) == 0.0 and handovers.detour(0.01) == pytest.approx(100)


# --- picking ---------------------------------------------------------------------------------------------------------


def cluster(num_prefill: int = 1, **spec: object) -> Router:
    """Prefill workers that compute 10,000 tokens/s, d0 near and d1 at 1 MB/s; a token's KV has 1000 bytes."""
    made = Router(RouterSpec(**spec))  # type: ignore[arg-type]
    for i in range(num_prefill):
        made.on(0.0, WorkerUp(f"p{i}", 0, Role.PREFILL, 1000, 16, 1000))
    for name in ("d0", "d1"):
        made.on(0.0, WorkerUp(name, 0, Role.DECODE, 1000, 16, 1000))
    made.handovers.computed(1000, 0.1)
    return made


def measure(made: Router, *links: tuple[str, str, float]) -> None:
    for worker, peer, rate in links:
        made.on(0.0, LinkMeasured(worker, peer, rate))


def submit(made: Router, request: int, num_prompt: int = 160) -> dict[Role, str]:
    orders = made.on(1.0, Submitted(request, num_prompt, 16))
    return {order.part: order.worker for order in orders if isinstance(order, Place)}


def test_the_near_one_is_preferred_and_the_far_one_takes_what_is_too_much() -> None:
    made = cluster()
    measure(made, ("d0", "p0", 1e9), ("d1", "p0", 1e6))
    chosen = [submit(made, i)[Role.DECODE] for i in range(160)]
    first_far = chosen.index("d1")
    assert first_far == 146, "160 tokens take 0.16 s, as much as 1600 tokens; each request here is 11 tokens of load"
    assert made.requests[0].why == "d0 (load 160 + handover 0: 0.16 ms) before d1 (load 160 + handover 1600: 160 ms)"
    assert made.requests[first_far].why.startswith("d1 (load 160 + handover 1600: 160 ms) before d0 (load 1766 + ")


def test_unmeasured_links_change_nothing() -> None:
    made = cluster()
    assert [submit(made, i)[Role.DECODE] for i in range(4)] == ["d0", "d1", "d0", "d1"]
    assert made.requests[0].why == ""


def test_what_is_cached_there_need_not_travel() -> None:
    made = cluster()
    hashes = tuple(bytes([i]) for i in range(10))
    made.workers["d1"].remember(hashes)
    measure(made, ("d0", "p0", 1e9), ("d1", "p0", 1e6))
    made.on(1.0, Submitted(1, 160, 16, hashes))
    assert made.requests[1].decode == "d1"


def test_each_decode_worker_has_a_near_prefill_worker() -> None:
    made = cluster(num_prefill=2)
    near, far = 1e9, 1e6
    measure(made, ("d0", "p0", near), ("d0", "p1", far), ("d1", "p0", far), ("d1", "p1", near))
    pairs = [submit(made, i) for i in range(6)]
    assert {(pair[Role.PREFILL], pair[Role.DECODE]) for pair in pairs} == {("p0", "d0"), ("p1", "d1")}


def test_round_robin_heeds_no_link() -> None:
    made = cluster(policy="round-robin")
    measure(made, ("d0", "p0", 1e9), ("d1", "p0", 1e3))
    assert [submit(made, i)[Role.DECODE] for i in range(4)] == ["d0", "d1", "d0", "d1"]


def test_who_comes_back_is_measured_anew() -> None:
    made = cluster()
    measure(made, ("d1", "p0", 1e3))
    made.on(1.0, WorkerLost("d1"))
    made.on(2.0, WorkerUp("d1", 1, Role.DECODE, 1000, 16, 1000))
    assert {submit(made, i)[Role.DECODE] for i in range(2)} == {"d0", "d1"}


def test_the_pace_is_learned_from_prompts_that_had_a_worker_to_themselves() -> None:
    made = cluster()
    made.handovers.tokens_per_s = 0.0
    for i in range(2):
        submit(made, i, 200)  # at 1.0
    made.on(1.1, Progress(attempt_id(0, 0)))
    made.on(1.3, Progress(attempt_id(1, 0)))
    assert made.handovers.tokens_per_s == pytest.approx(2000)


def test_in_the_simulator_too() -> None:
    """Reads tell the links apart; one request at a time goes to the near worker, once both were tried."""
    specs = [WorkerSpec("p0", Role.PREFILL, num_blocks=4096, block_size=16)]
    specs += [WorkerSpec(name, Role.DECODE, num_blocks=4096, block_size=16) for name in ("d0", "d1")]
    link = Link(10e9, rates=LinkRates(None, (LinkRule("", "d0", 50e6),)))
    placed: list[str] = []

    def watch(now: float, name: str, event: object, orders: object) -> None:
        if isinstance(event, Place) and event.part == Role.DECODE:
            placed.append(name)

    arrivals = [Arrival(float(i), 512, 8, 8, stem=i) for i in range(12)]
    costs = Costs(step=StepCost(1e-3, 1e-5, 0.0), kv_bytes_per_token=10_000)
    result = simulate(specs, RouterSpec(), costs, link, arrivals, observer=watch)
    assert result.counts["finished"] == 12
    assert set(placed[:3]) == {"d0", "d1"} and set(placed[3:]) == {"d1"}
