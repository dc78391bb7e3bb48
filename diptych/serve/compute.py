"""The thread in which a worker's executor lives: commands in order, results back to the event loop.

Up to `depth` steps are launched before the first is collected. An executor that raises ends the process: its KV can no
longer be trusted, and the router places its requests elsewhere. Not responsible for what a step holds.
"""

import asyncio
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from diptych.engine.executor import Executor, Result
from diptych.policy.messages import Run

log = logging.getLogger(__name__)


class ComputeThread:
    """Runs an executor. `done(step, result)` is called on the loop that made this object.

    `name_of` an attempt's request is asked for the last words of a step that failed.
    """

    def __init__(
        self, executor: Executor, depth: int, done: Callable[[int, Result], None], name_of: Callable[[int], str] = str
    ):
        self._executor = executor
        self._depth = depth
        self._done = done
        self._name_of = name_of
        self._launched: deque[tuple[Run, Any]] = deque()
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[], Any] | Run | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def call(self, command: Callable[[], Any]) -> None:
        """Do something to the executor, in turn."""
        self._commands.put(command)

    def run(self, step: Run) -> None:
        """Compute a step, in turn."""
        self._commands.put(step)

    def stop(self) -> None:
        """End the thread after what is in the queue."""
        self._commands.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            self._work()
        except Exception:
            rids = {piece.rid for run, _ in self._launched for piece in run.slices}
            names = " ".join(sorted(self._name_of(rid) for rid in rids))
            log.exception("the engine failed; this worker ends", extra={"fields": {"requests": names}})
            os._exit(1)

    def _work(self) -> None:
        launched = self._launched
        while True:
            if launched and (len(launched) >= self._depth or self._commands.empty()):
                run, handle = launched[0]
                result = self._executor.collect(handle)
                launched.popleft()
                self._loop.call_soon_threadsafe(self._done, run.step, result)
                continue
            match self._commands.get():
                case None:
                    return
                case Run() as run:
                    launched.append((run, None))  # before it is launched: where that fails, it is known which one
                    launched[-1] = (run, self._executor.launch(run))
                case command:
                    command()
