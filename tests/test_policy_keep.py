"""What a decode worker's death costs: nothing of the prompt, and at most two blocks of the answer.

Random worlds are simulated in which one decode worker dies, and every computed position is counted. That nothing is
lost, read too early or leaked on the way is held for the same objects by `test_sim_laws.py`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from policy_world import Pick, Witness, World, draw_world

from diptych.policy.batching import WorkerSpec
from diptych.policy.messages import (
    Message,
    Place,
    Role,
    Run,
    request_of,
)
from diptych.sim.conditions import WorkerDies
from diptych.sim.costs import Costs, Link, StepCost
from diptych.sim.driver import Simulation

SIZE = 4


def roomy(pick: Pick) -> World:
    """Two and two workers with room for everybody, fast links, and the death of one decode worker."""
    world = draw_world(pick, quiet=True)
    size = world.cluster[0].block_size
    cluster = tuple(
        WorkerSpec(name, role, 240, size, chunk=(None, 3, 8)[pick(0, 2)], depth=pick(1, 2))
        for name, role in (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE))
    )
    happenings = (WorkerDies(pick(20, 400) / 1000, "d0", (None, 0.05)[pick(0, 1)]),)
    return replace(
        world, cluster=cluster, happenings=happenings, read_failure=0.0, settle_s=0.0, link=Link(1e9, 0.0, "pair"),
        message_s=0.0005, costs=Costs(StepCost(0.01, 0.001, 0.0001), kv_bytes_per_token=64),
    )  # fmt: skip


@pytest.mark.parametrize("block", range(6))
def test_a_decode_workers_death_costs_no_prompt(block: int) -> None:
    num_resumed = 0
    for seed in range(100 * block, 100 * (block + 1)):
        world = roomy(Random(seed).randint)
        ran: Counter[tuple[int, int]] = Counter()
        resumed: dict[int, int] = {}  # request -> tokens of the answer that were known at its last placement
        witness = Witness(world)

        def observe(now: float, name: str, event: Message, orders: Sequence[Message]) -> None:
            witness(now, name, event, orders)  # noqa: B023
            if isinstance(event, Place) and event.rid % 64:
                resumed[request_of(event.rid)] = event.num_tokens - event.num_prompt  # noqa: B023
            if name.startswith("p"):
                for order in orders:
                    for piece in order.slices if isinstance(order, Run) else ():
                        where = request_of(piece.rid)
                        ran.update((where, i) for i in range(piece.start, piece.start + piece.count))  # noqa: B023

        simulation = Simulation(
            world.cluster, world.router, world.costs, world.link, world.arrivals,
            conditions=witness, happenings=world.happenings, observer=observe, bulk=False, num_events=50_000,
        )  # fmt: skip
        witness.simulation = simulation
        witness.check_end(simulation.run())
        num_resumed += len(resumed)
        size = world.cluster[0].block_size
        for request, num_written in resumed.items():
            prompt = world.arrivals[request].num_prompt
            twice = [i for (number, i), times in ran.items() if number == request and times > 1 and i < prompt]
            again = [i for (number, i) in ran if number == request and i >= prompt]
            assert len(twice) <= (0 if num_written else size), (seed, request, twice)
            assert len(again) <= 2 * size, (seed, request, again)
    assert num_resumed > 50
