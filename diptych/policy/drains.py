"""Workers that are being taken out of service: they are given nothing more, and go when nothing is left on them.

First the router's own books must say that nothing is left there, then the worker is asked (`Drain`), whose KV may be
read for a while yet; it says `Drained` and is dismissed. One whose time is up is dismissed as it is. Not responsible
for the books (`router.py`).
"""

from collections.abc import Callable
from math import inf

from diptych.policy.membership import Dismiss, Drain


class Drains:
    """The workers that drain, and until when they may."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._asked: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._until)

    def __contains__(self, worker: str) -> bool:
        return worker in self._until

    def begin(self, worker: str, until: float) -> None:
        """Take a worker out of service; where that is under way already, the time is set anew."""
        self._until[worker] = until

    def forget(self, worker: str) -> None:
        """It is gone."""
        self._until.pop(worker, None)
        self._asked.discard(worker)

    def next_deadline(self) -> float | None:
        """When the next one's time is up."""
        return min((until for until in self._until.values() if until < inf), default=None)

    def proceed(self, is_idle: Callable[[str], bool]) -> list[Drain]:
        """Ask those whose last request has just left the books whether anything else is left there."""
        ready = [worker for worker in self._until if worker not in self._asked and is_idle(worker)]
        self._asked.update(ready)
        return [Drain(worker, 0.0) for worker in ready]

    def expire(self, now: float) -> list[Dismiss]:
        """Dismiss those whose time is up. They stay in the list until they are gone."""
        late = [worker for worker, until in self._until.items() if until <= now]
        for worker in late:
            self._until[worker] = inf
        return [Dismiss(worker) for worker in late]
