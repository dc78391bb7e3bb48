"""The router's driver: its books of what a death cost."""

from router_double import Workers

from diptych.policy.messages import Role
from diptych.serve.router import Resumed


def test_a_keeper_counts_once_it_has_computed_the_prompt() -> None:
    workers = Workers()
    workers.submit()
    workers.write(Role.PREFILL, 0)
    workers.die(Role.DECODE)
    workers.die(Role.DECODE)  # the next attempt's, before it has said a token
    workers.write(Role.PREFILL, 1, again=(0, 1))
    assert workers.driver.resumed == {"kept": Resumed(1, 0, 1, 1), "not kept": Resumed()}


def test_a_keeper_that_died_halfway_through_was_none() -> None:
    """Its successor's decode worker dies while the prompt is computed anew: what was missing then was not lost now."""
    workers = Workers()
    workers.submit()
    workers.write(Role.PREFILL, 0)
    first = workers.at[Role.PREFILL].worker
    workers.die(Role.DECODE)
    assert workers.die(Role.PREFILL) == first
    second = workers.at[Role.PREFILL].worker
    workers.die(Role.DECODE)
    assert workers.at[Role.PREFILL].worker == second != first
    workers.write(Role.PREFILL, 1, again=(4, 0))
    assert workers.driver.resumed == {"kept": Resumed(), "not kept": Resumed(1, 4, 0, 0)}
