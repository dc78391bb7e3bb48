"""The router's driver: its books of what a death cost."""

import logging
from typing import Any

import pytest

from diptych.engine.executor import Sampling
from diptych.policy.membership import Drain
from diptych.policy.messages import Cancel, Emit, Place, Role, Submitted, WorkerUp
from diptych.policy.router import Router
from diptych.serve.frontend import Label
from diptych.serve.router import Resumed, RouterDriver
from diptych.serve.wire import Deliver, Extra, Ticket, pack_emit, pack_ids, unpack_ticket

PROMPT = [1, 2, 3, 4, 5]
ROLES = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE, "d2": Role.DECODE}


class Workers:
    """Both ports of the driver; remembers who was given the present attempt."""

    def __init__(self) -> None:
        self.driver = RouterDriver(Router(), self, lambda: 0.0, None)
        self.at: dict[Role, Place] = {}
        self.names: list[str] = []
        for name, role in ROLES.items():
            self.driver.worker_up(WorkerUp(name, 0, role, 64, 4))
        ticket = Ticket(pack_ids(PROMPT), len(PROMPT), Sampling(), b"")
        self.driver.submit(self, Submitted(1, len(PROMPT), 10, ()), ticket, Label("cmpl-1", "mine", 2))

    def send(self, worker: str, order: Place | Cancel | Drain, attachment: bytes) -> None:
        if isinstance(order, Place):
            self.at[order.part] = order
            self.names.append(unpack_ticket(attachment).name)

    def dismiss(self, worker: str) -> None: ...

    def deliver(self, client: Any, message: Deliver, attachment: bytes) -> None: ...

    def write(self, part: Role, number: int, again: tuple[int, int] | None = None) -> None:
        """The worker with that part says a token."""
        place = self.at[part]
        self.driver.heard(place.worker, Emit(place.rid, number, 1), pack_emit(pack_ids([7]), Extra(0, again=again)))

    def die(self, part: Role) -> str:
        """The worker with that part is lost; its name."""
        name = self.at[part].worker
        self.driver.worker_lost(name)
        return name


def test_a_keeper_counts_once_it_has_computed_the_prompt() -> None:
    workers = Workers()
    workers.write(Role.PREFILL, 0)
    workers.die(Role.DECODE)
    workers.die(Role.DECODE)  # the next attempt's, before it has said a token
    workers.write(Role.PREFILL, 1, again=(0, 1))
    assert workers.driver.resumed == {"kept": Resumed(1, 0, 1, 1), "not kept": Resumed()}


def test_a_keeper_that_died_halfway_through_was_none() -> None:
    """Its successor's decode worker dies while the prompt is computed anew: what was missing then was not lost now."""
    workers = Workers()
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
        workers.write(Role.PREFILL, 0)
        assert not caplog.records, "that all is well is for whoever wants to know"
        workers.write(Role.PREFILL, 0)  # once more, as no worker that is well says it
        workers.die(Role.DECODE)
        for name in ROLES:
            workers.driver.worker_lost(name)
    facts = [record.fields for record in caplog.records]  # type: ignore[attr-defined]
    assert {fact["request"] for fact in facts} == {"mine/2"} == set(workers.names)
    strange, refused, lost, *_, last = caplog.records
    assert strange.levelno == logging.ERROR and facts[0]["attempt"] == 64
    assert refused.getMessage() == "a request goes on elsewhere: refused"
    assert lost.getMessage() == "a request goes on elsewhere: worker_lost"
    assert [fact["attempt"] for fact in facts[1:3]] == [65, 66] and facts[2]["token"] == 1
    assert last.getMessage().startswith("a request ends: ") and last.levelno == logging.WARNING
