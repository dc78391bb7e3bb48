"""The router's driver: its books of what a death cost."""

import logging

import pytest
from router_double import Workers

from diptych.errors import ProtocolError
from diptych.policy.messages import Emit, Role
from diptych.serve.frontend import Label
from diptych.serve.router import Resumed
from diptych.serve.wire import pack_ids


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


def test_every_line_about_a_request_has_the_name_its_client_knows(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        workers = Workers()
        workers.submit(1, Label("cmpl-1", "mine", 2))
        workers.write(Role.PREFILL, 0)
        assert not caplog.records, "that all is well is for whoever wants to know"
        workers.write(Role.PREFILL, 0)  # once more, as no worker that is well says it
        workers.die(Role.DECODE)
        for name in list(workers.driver.policy.workers):
            workers.driver.worker_lost(name)
    facts = [record.fields for record in caplog.records]  # type: ignore[attr-defined]
    assert {fact["request"] for fact in facts} == {"mine/2"} == set(workers.names)
    strange, refused, lost, *_, last = caplog.records
    assert strange.levelno == logging.ERROR and facts[0]["attempt"] == 64
    assert refused.getMessage() == "a request goes on elsewhere: refused"
    assert lost.getMessage() == "a request goes on elsewhere: worker_lost"
    assert [fact["attempt"] for fact in facts[1:3]] == [65, 66] and facts[2]["token"] == 1
    assert last.getMessage().startswith("a request ends: ") and last.levelno == logging.WARNING


def test_what_cannot_be_read_later_is_refused_when_it_is_said() -> None:
    """The second token of another attempt waits for the first, and is then nobody else's fault."""
    workers = Workers()
    workers.submit()
    workers.write(Role.PREFILL, 0)
    workers.die(Role.DECODE)
    place = workers.at[Role.DECODE]
    with pytest.raises(ProtocolError):
        workers.driver.heard(place.worker, Emit(place.rid, 2, 1), pack_ids([7]) + b"\xc1")
    workers.write(Role.PREFILL, 1)
    assert workers.driver.num_broken == 0
