"""One call from the command line and the planner: a cluster and a workload in, a result out.

Not responsible for reading configuration (`config.py`) or showing anything (`report.py`).
"""

from collections.abc import Iterable, Sequence

from diptych.policy.batching import WorkerSpec
from diptych.policy.books import RouterSpec
from diptych.policy.messages import Role
from diptych.sim.costs import Costs, Link
from diptych.sim.driver import Observer, SimResult, simulate
from diptych.sim.workload import Arrival


def make_cluster(
    prefill: int = 0,
    decode: int = 0,
    mixed: int = 0,
    *,
    num_blocks: int = 8192,
    block_size: int = 16,
    chunk: int | None = 512,
    itl_budget_s: float | None = None,
) -> list[WorkerSpec]:
    """`--prefill N --decode N --mixed N` as specs, named like `prefill-0`. All alike but for their roles."""
    numbers = {Role.PREFILL: prefill, Role.DECODE: decode, Role.MIXED: mixed}
    return [
        WorkerSpec(
            f"{role}-{i}", role, num_blocks=num_blocks, block_size=block_size, chunk=chunk, itl_budget_s=itl_budget_s
        )
        for role, number in numbers.items()
        for i in range(number)
    ]


def run_simulation(
    cluster: Sequence[WorkerSpec],
    *,
    router: RouterSpec | None = None,
    costs: Costs | None = None,
    link: Link | None = None,
    arrivals: Iterable[Arrival],
    observer: Observer | None = None,
) -> SimResult:
    """Simulate `arrivals`.

    Raises ValueError for a cluster that can serve nothing (no mixed worker and no pair).
    """
    roles = {spec.role for spec in cluster}
    if Role.MIXED not in roles and not {Role.PREFILL, Role.DECODE} <= roles:
        raise ValueError("a cluster needs a mixed worker, or a prefill and a decode worker")
    return simulate(cluster, router or RouterSpec(), costs or Costs(), link or Link(), arrivals, observer=observer)
