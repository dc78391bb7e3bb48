"""Rows of PASS and FAIL: what every client script prints. Not responsible for what is checked."""

import sys
import traceback
from collections.abc import Callable

Scenario = Callable[[], None]


class Rows:
    """Collects scenarios by decorating them, runs them in order, and prints a row for each."""

    def __init__(self, client: str):
        self._client = client
        self._scenarios: list[Scenario] = []

    def __call__(self, scenario: Scenario) -> Scenario:
        self._scenarios.append(scenario)
        return scenario

    def run(self) -> None:
        """Run all; ends the process, with status 1 where one failed."""
        failed = 0
        for scenario in self._scenarios:
            name = scenario.__name__.replace("_", " ")
            try:
                scenario()
            except Exception as error:
                failed += 1
                print(f"FAIL  {self._client}: {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                traceback.print_exc(file=sys.stderr)
            else:
                print(f"PASS  {self._client}: {name}", flush=True)
        sys.exit(1 if failed else 0)
