"""The laws of the system, in random worlds: small memories, slow messages, failing reads, workers that die,
join and drain, broken connections.

What is checked at every event is in `policy_world.Witness`. Outside the suite the same worlds can be run by the ten
thousand: `python tests/policy_world.py 20000`.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_world import Pick, World, check_empty, draw_squeezed_world, draw_world, run_world

from diptych.policy.batching import WorkerSpec
from diptych.policy.books import RouterSpec
from diptych.policy.messages import Emit, Message, Role, Run, StepDone
from diptych.policy.router import Router
from diptych.policy.worker import Worker
from diptych.sim.conditions import Calm, WorkerJoins
from diptych.sim.costs import Costs, Link, StepCost
from diptych.sim.driver import ROUTER, SimResult, Simulation
from diptych.sim.driver import simulate as simulate_bare
from diptych.sim.workload import Arrival

Entry = tuple[float, str, Message, Sequence[Message]]
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def picker(data: st.DataObject) -> Pick:
    return lambda low, high: data.draw(st.integers(low, high))


# --- conservation, fences, idleness ----------------------------------------------------------------------------------


@settings(max_examples=600, deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_laws_hold_whatever_goes_wrong(data: st.DataObject) -> None:
    """Requests and blocks are conserved, KV is whole where it is used, nobody idles, everything ends."""
    run_world(draw_world(picker(data)))


@settings(max_examples=500, deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_laws_hold_under_pressure_and_nothing_fails(data: st.DataObject) -> None:
    """The same where nothing dies: no request that was taken may fail."""
    run_world(draw_world(picker(data), quiet=True))


@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_laws_hold_where_answers_and_arriving_kv_compete_for_memory(data: st.DataObject) -> None:
    """Preemptions and evictions by the dozen; still everything finishes, and no reader is left unfenced."""
    run_world(draw_squeezed_world(picker(data)))


@pytest.mark.parametrize("block", range(10))
def test_worlds_that_are_always_the_same(block: int) -> None:
    """A fixed sample beside Hypothesis's own, which prefers small worlds."""
    for seed in range(100 * block, 100 * (block + 1)):
        pick = Random(seed).randint
        run_world(draw_squeezed_world(pick) if seed % 4 == 3 else draw_world(pick, quiet=seed % 2 == 0))


# --- one bulk event is n single ones ---------------------------------------------------------------------------------


def steady(world: World) -> World:
    """The same world as one in which steps may be taken in bulk, with costs that make exact ties unlikely."""

    def plain(spec: WorkerSpec) -> WorkerSpec:
        return replace(spec, depth=1, itl_budget_s=None)

    cluster = tuple(map(plain, world.cluster))
    happenings = tuple(replace(h, spec=plain(h.spec)) if isinstance(h, WorkerJoins) else h for h in world.happenings)
    return replace(
        world,
        cluster=cluster,
        happenings=happenings,
        costs=Costs(StepCost(0.0100071, 0.0010003, 0.0001001), kv_bytes_per_token=64),
    )


def simulate(world: World, bulk: bool, journal: list[Entry] | None = None) -> tuple[Simulation, SimResult]:
    def observe(now: float, name: str, event: Message, orders: Sequence[Message]) -> None:
        if journal is not None:
            journal.append((now, name, event, tuple(orders)))

    simulation = Simulation(
        world.cluster, world.router, world.costs, world.link, world.arrivals,
        conditions=Calm(world.message_s, world.settle_s), happenings=world.happenings, observer=observe,
        bulk=bulk, num_events=20_000,
    )  # fmt: skip
    return simulation, simulation.run()


def decisions(journal: list[Entry]) -> dict[str, list[Any]]:
    """What each object decided, without what bulk merges: tokens said, and steps that only go on."""
    merged = (Emit, Run)
    kept: dict[str, list[Any]] = {}
    for now, name, event, orders in journal:
        essential = [order for order in orders if not isinstance(order, merged)]
        if not isinstance(event, StepDone):
            kept.setdefault(name, []).append((now, event, essential))
        elif essential:
            kept.setdefault(name, []).append((now, event.finished, essential))
    return kept


def final_state(simulation: Simulation) -> list[Any]:
    pools = [machine.worker.pool for machine in simulation.machines.values()]
    return [(pool.counts(), pool._free, list(pool._cached), pool._hash_of) for pool in pools]


@settings(max_examples=400, deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_one_bulk_is_many_single_steps(data: st.DataObject) -> None:
    world = steady(draw_world(picker(data)))
    single_journal: list[Entry] = []
    bulk_journal: list[Entry] = []
    single, expected = simulate(world, False, single_journal)
    bulk, result = simulate(world, True, bulk_journal)
    for ours, theirs in zip(result.streams, expected.streams, strict=True):
        assert list(ours.times()) == list(theirs.times()), "each token at the same instant"
        assert (ours.status, ours.ended, ours.num_attempts) == (theirs.status, theirs.ended, theirs.num_attempts)
    assert decisions(bulk_journal) == decisions(single_journal)
    assert final_state(bulk) == final_state(single)
    assert [m.num_steps for m in result.machines] == [m.num_steps for m in expected.machines]


def test_bulk_makes_long_answers_cheap() -> None:
    cluster = [WorkerSpec("m", Role.MIXED, num_blocks=100)]
    arrivals = [Arrival(0.3 * i, 16, 300, 300) for i in range(4)]
    bulk, single = (
        simulate_bare(cluster, RouterSpec(), Costs(), Link(), arrivals, bulk=bulk).num_events for bulk in (True, False)
    )
    assert single > 400 and bulk < 60


# --- determinism and replay ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_same_seed_same_bytes(data: st.DataObject) -> None:
    world = draw_world(picker(data))
    journals: list[list[Entry]] = [[], []]
    for journal in journals:
        simulate(world, True, journal)
    assert repr(journals[0]).encode() == repr(journals[1]).encode()


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_events_replayed_to_fresh_objects_give_the_same_orders(data: st.DataObject) -> None:
    world = draw_world(picker(data), quiet=True)  # a worker that comes back is another object
    journal: list[Entry] = []
    simulation, _ = simulate(world, True, journal)
    fresh: dict[str, Router | Worker] = {spec.name: Worker(spec) for spec in world.workers}
    fresh[ROUTER] = Router(world.router)
    for now, name, event, orders in journal:
        again = fresh[name].on(now, event)  # type: ignore[arg-type]
        assert tuple(again) == orders, (now, name, event)
    for spec in world.workers:
        if simulation.machines[spec.name].alive:  # who was drained goes with what it keeps for others
            check_empty(fresh[spec.name])  # type: ignore[arg-type]
