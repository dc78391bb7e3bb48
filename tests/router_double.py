"""A router's driver between doubles: workers that say what a test lets them say, and a client that hears nothing."""

from typing import Any

from diptych.engine.executor import Sampling
from diptych.policy.membership import Drain
from diptych.policy.messages import Cancel, Emit, Place, Role, Submitted, WorkerUp
from diptych.policy.router import Router
from diptych.serve.frontend import NO_LABEL, Label
from diptych.serve.router import RouterDriver
from diptych.serve.wire import Deliver, Extra, Ticket, pack_emit, pack_ids, unpack_ticket

PROMPT = [1, 2, 3, 4, 5]


class Workers:
    """Both ports of a driver, and its clock. `at` has the last request's present attempt: part -> what was placed."""

    def __init__(self, num_prefill: int = 2, num_decode: int = 3) -> None:
        self.now = 0.0
        self.driver = RouterDriver(Router(), self, lambda: self.now, None)
        self.at: dict[Role, Place] = {}
        self.names: list[str] = []  # by which workers know what they are given
        roles = {f"p{i}": Role.PREFILL for i in range(num_prefill)} | {f"d{i}": Role.DECODE for i in range(num_decode)}
        for name, role in roles.items():
            self.driver.worker_up(WorkerUp(name, 0, role, 64, 4))

    def submit(self, number: int = 1, label: Label = NO_LABEL) -> None:
        """A request of ten tokens."""
        ticket = Ticket(pack_ids(PROMPT), len(PROMPT), Sampling(), b"")
        self.driver.submit(self, Submitted(number, len(PROMPT), 10, ()), ticket, label)

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
