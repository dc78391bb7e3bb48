"""The ownership protocol, explored exhaustively at small scope.

A breadth-first search over everything that can happen to a small cluster. A state is: the policy objects themselves
(`automata.py`), messages on their way, reads, steps, and which token's KV is in which slot of which block. From each
state every event that is possible next is tried: any channel delivers its next message, a read or a step ends, a lease
ends, and, as often as the scope allows, a client leaves, a read fails, a worker dies, a connection breaks, a message
comes twice or never.

    python tests/explore.py                    every scope of up to 10^5 states or so (minutes)
    python tests/explore.py --scope two-cut    one of them; --list names all

Time is coarse: a worker's clock goes on only with its ticks, each to the next instant it asked for. So a lease may end
before or after anything else, but which of two leases that began between the same two ticks ends first is not explored.
Unless the scope allows haste, a tick comes only when nothing else can.

The laws are in `automata.py` and `small_world.py`; and here: from every state all can still end without anybody's help,
with requests answered or refused and every block home.
"""

import argparse
import logging
import sys
import time
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from automata import Violation, leftovers
from small_world import DEAD, Budget, Label, Move, Scope, Space, World

from diptych.policy.batching import WorkerSpec
from diptych.policy.messages import Role

# --- scopes ----------------------------------------------------------------------------------------------------------


def spec(name: str, num_blocks: int = 3, size: int = 2, **more: Any) -> WorkerSpec:
    """A worker by its name: p0 prefills, d0 decodes. A lease is three units of time, so that a beat is one."""
    role = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}[name[0]]
    return WorkerSpec(name, role, num_blocks, size, **{"chunk": None, "lease_s": 3.0, "replicate": False} | more)


def pair(**more: Any) -> tuple[WorkerSpec, ...]:
    return spec("p", **more), spec("d", **more)


ONE, TWO = ((2, 2),), ((2, 2), (2, 2))
TRIO = (spec("p", replicate=True), spec("d0", replicate=True), spec("d1", replicate=True))
REPEATABLE = (
    "Cancel", "Publish", "Done", "Answer", "Revoke", "Drop", "Beat", "Replicate", "Replicated", "Release", "PeerLost",
)  # fmt: skip
LOSABLE = ("Cancel", "Publish", "Done", "Revoke", "Beat", "Replicate", "Replicated")
SCOPES = {
    # two requests, which do not fit into one decode worker at once
    "calm": Scope(pair(), TWO, Budget()),
    "cancel": Scope(pair(), TWO, Budget(cancels=1)),
    "failure": Scope(pair(), TWO, Budget(failures=1)),
    "death": Scope(pair(), TWO, Budget(deaths=1)),
    "haste": Scope(pair(), TWO, Budget(haste=1)),
    "ahead": Scope(pair(depth=2), TWO, Budget(cancels=1)),
    "shared": Scope(pair(), ((3, 2), (3, 2)), Budget(cancels=1), shared=True),
    "squeeze": Scope(pair(num_blocks=4, size=1), TWO, Budget(cancels=1, failures=1)),
    # one request, and more that goes wrong
    "one": Scope(pair(), ONE, Budget(cancels=1, failures=1, haste=1)),
    "restart": Scope(pair(), ONE, Budget(cancels=1, deaths=1, haste=1), revive=True),
    "restarts": Scope(pair(), ONE, Budget(deaths=2, haste=1), revive=True),
    "cut": Scope(pair(), ONE, Budget(cuts=1, haste=1), attempts=2),
    # a prompt that is read while it is computed
    "parts": Scope(pair(chunk=1), ((4, 2),), Budget(cancels=1, failures=1, haste=1)),
    "parts-restart": Scope(pair(chunk=1), ((4, 2),), Budget(cancels=1, deaths=1), revive=True),
    "parts-cut": Scope(pair(chunk=1), ((4, 2),), Budget(cuts=1), attempts=2),
    # what a death costs: replicas, and a last block that is not full
    "replicas": Scope(pair(replicate=True), ((2, 4),), Budget(cancels=1, failures=1, haste=1)),
    "replicas-restart": Scope(pair(replicate=True), ((2, 4),), Budget(deaths=1, failures=1), revive=True),
    "tail": Scope(pair(replicate=True), ((3, 3),), Budget(deaths=1, haste=1), revive=True),
    "tail-cut": Scope(pair(replicate=True), ((3, 3),), Budget(cuts=1), attempts=2),
    "failover": Scope(TRIO, ((3, 3),), Budget(deaths=1), attempts=2),
    # beyond what connections promise: a message comes twice, or never, though the connection holds
    "twice": Scope(pair(num_blocks=4, replicate=True), ((2, 6),), Budget(doubles=1), kinds=REPEATABLE),
    "twice-cancel": Scope(pair(replicate=True), ((2, 4),), Budget(cancels=1, doubles=1), kinds=REPEATABLE),
    "never": Scope(pair(replicate=True), ((2, 4),), Budget(cancels=1, losses=1), kinds=LOSABLE),
    # for a machine with time and memory
    "cancels": Scope(pair(), TWO, Budget(cancels=2, haste=1), quick=False),
    "two-restart": Scope(pair(), TWO, Budget(cancels=1, deaths=1), revive=True, quick=False),
    "two-cut": Scope(pair(), TWO, Budget(cuts=1), attempts=2, quick=False),
    "two-replicas": Scope(pair(replicate=True), ((2, 4), (2, 2)), Budget(cancels=1, failures=1), quick=False),
    "failover-haste": Scope(TRIO, ((2, 4),), Budget(deaths=1, haste=1), attempts=2, quick=False),
}


# --- the search ------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What was found. `broken`: the law, and the events that lead there. `bounded`: it stopped at a limit."""

    num_states: int = 0
    num_transitions: int = 0
    depth: int = 0
    num_ends: int = 0
    num_objects: tuple[int, ...] = ()
    seconds: float = 0.0
    bounded: bool = False
    broken: str = ""
    trace: list[Label] = field(default_factory=list)

    def __str__(self) -> str:
        how = "stopped at the limit" if self.bounded else "all of them"
        return (
            f"{self.num_states:>9,} states ({how}), {self.num_transitions:>9,} transitions, depth {self.depth:>3}, "
            f"{self.num_ends:>5} ends, objects {'+'.join(map(str, self.num_objects))}, {self.seconds:6.1f} s"
        )


class Search:
    """Breadth first, so that what breaks a law is a shortest way to break it."""

    def __init__(self, space: Space, limit: int):
        self.space = space
        self.limit = limit
        self.worlds: list[World] = []
        self.numbers: dict[World, int] = {}
        self.parents = array("q")
        self.levels = array("q")
        self.edges = array("q")  # pairs of states: what must be able to happen
        self.result = Result()

    def run(self) -> Result:
        """Look at everything."""
        result, started = self.result, time.perf_counter()
        with patch("diptych.policy.router.MAX_ATTEMPTS", self.space.scope.attempts):
            self._number(self.space.first(), -1)
            at = 0
            while at < len(self.worlds) and len(self.worlds) < self.limit and not result.broken:
                self._expand(at)
                at += 1
            result.bounded = at < len(self.worlds)
            if not (result.bounded or result.broken):
                self._all_can_end()
        result.num_states = len(self.worlds)
        result.depth = max(self.levels)
        result.num_objects = tuple(map(len, (self.space.front, *self.space.stations)))
        result.seconds = time.perf_counter() - started
        return result

    def _number(self, world: World, parent: int) -> int:
        number = self.numbers.get(world)
        if number is None:
            number = self.numbers[world] = len(self.worlds)
            self.worlds.append(world)
            self.parents.append(parent)
            self.levels.append(self.levels[parent] + 1 if parent >= 0 else 0)
        return number

    def _expand(self, at: int) -> None:
        try:
            for _, needed, world in self.space.follow(self.worlds[at]):
                number = self._number(world, at)
                self.result.num_transitions += 1
                if needed:
                    self.edges.append(at)
                    self.edges.append(number)
        except Violation as broken:
            self.result.broken, trying = str(broken), self.space.trying
            self.result.trace = [*self.trace(at), trying]

    def _all_can_end(self) -> None:
        """From every state an empty one can be reached by what must be able to happen."""
        count = len(self.worlds)
        before: list[list[int]] = [[] for _ in range(count)]
        for k in range(0, len(self.edges), 2):
            before[self.edges[k + 1]].append(self.edges[k])
        ends = [number for number in range(count) if self.space.is_empty(self.worlds[number])]
        self.result.num_ends = len(ends)
        reached = bytearray(count)
        queue = deque(ends)
        for number in ends:
            reached[number] = 1
        while queue:
            for number in before[queue.popleft()]:
                if not reached[number]:
                    reached[number] = 1
                    queue.append(number)
        stuck = [number for number in range(count) if not reached[number]]
        if stuck:
            goes_on = set(self.edges[::2])
            worst = next((number for number in stuck if number not in goes_on), stuck[0])
            self.result.broken = f"{len(stuck)} states from which nothing leads to an end; one has {self.show(worst)}"
            self.result.trace = self.trace(worst)

    def trace(self, at: int) -> list[Label]:
        """What happened until that state."""
        way = [at]
        while self.parents[way[-1]] >= 0:
            way.append(self.parents[way[-1]])
        way.reverse()
        labels: list[Label] = []
        for here, there in zip(way, way[1:], strict=False):
            following = self.space.follow(self.worlds[here])
            labels.append(next(label for label, _, world in following if world == self.worlds[there]))
        return labels

    def show(self, at: int) -> str:
        """What is left in a state."""
        move = Move(self.space, self.worlds[at])
        left: dict[str, Any] = {"requests": self.space.front.seen[move.router], "reads": move.reads}
        for i, state in enumerate(move.stations):
            if state != DEAD:
                left[self.space.names[i]] = leftovers(self.space.stations[i]._things[state].worker)
        left["channels"] = [[self.space.said.values[n] for n in channel] for channel in move.channels if channel]
        return str({what: value for what, value in left.items() if value})


def explore(scope: Scope, limit: int = 10_000_000) -> Result:
    """Every state of a scope, up to a limit."""
    return Search(Space(scope), limit).run()


def main() -> None:
    """Explore, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scope", action="append", choices=list(SCOPES))
    parser.add_argument("--limit", type=int, default=10_000_000, help="states at most")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    logging.disable()  # what attempts come to is said to the log, in every state
    if args.list:
        print("\n".join(SCOPES))
        return
    broken = 0
    for name in args.scope or [name for name, scope in SCOPES.items() if scope.quick]:
        result = explore(SCOPES[name], args.limit)
        print(f"{name:18}{result}", flush=True)
        if result.broken:
            broken += 1
            print("  BROKEN:", result.broken)
            for label in result.trace:
                print("   ", *label)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
