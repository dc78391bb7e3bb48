"""What a load does while it is sent, twice a second: how many requests are under way, done, failed, and how they fare.

Drawing takes some milliseconds of the process that also takes the times, so it is rare, and only done for a terminal.
Not responsible for the figures that count (`report.py`).
"""

import asyncio
import statistics
from collections import deque
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from diptych.bench.client import Record
from diptych.bench.report import ms, tpot, ttft

EVERY_S = 0.5
LATEST = 200  # answers of which medians are shown


class Watch:
    """Looks at records that are being filled; `async with` it while they are."""

    def __init__(self, records: Sequence[Record], total: int | None, console: Console | None = None):
        console = console or Console(stderr=True)
        self._records = records
        self._seen = 0  # records before this one are in `_open` or counted
        self._open: list[Record] = []
        self._latest: deque[Record] = deque(maxlen=LATEST)
        self.num_done = self.num_errors = self.num_tokens = 0
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
        self._progress = Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal)
        self._bar = self._progress.add_task("", total=total)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Watch":
        self._progress.start()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._task is not None:
            self._task.cancel()
        self._draw()
        self._progress.stop()

    def look(self) -> str:
        """Count what ended since the last look; say how it stands."""
        self._open += self._records[self._seen :]
        self._seen = len(self._records)
        over = [record for record in self._open if record.over]
        self._open = [record for record in self._open if not record.over]
        self.num_done += len(over)
        self.num_errors += sum(bool(record.error) for record in over)
        self._latest.extend(record for record in over if record.times_s)
        ttfts = [ttft(record) for record in self._latest]
        tpots = [tpot(record) for record in self._latest if len(record.times_s) > 1]
        medians = (ms(statistics.median(some) if some else None) for some in (ttfts, tpots))
        return f"{len(self._open)} running, {self.num_errors} errors, TTFT {next(medians)} ms, TPOT {next(medians)} ms"

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            if not self._progress.disable:
                self._draw()

    def _draw(self) -> None:
        self._progress.update(self._bar, description=self.look(), completed=self.num_done)
        self._progress.refresh()
