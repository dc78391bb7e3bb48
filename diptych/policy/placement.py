"""Which worker, or pair of workers, a request had best go to: filter -> score -> pick, for prefill and for decode.

Candidates that can hold the request, a score for each by the chosen policy (round robin, least loaded, prefix-aware),
and the lowest score wins. Where links were measured, the way to a decode worker counts as the prompt tokens that could
be computed meanwhile (`handover.py`). Where both mixed workers and pairs exist, `disaggregates` decides per request.

Not responsible for the books it reads (`books.py`), nor for what is done about a choice (`router.py`).
"""

from functools import partial

from diptych.policy.books import SCORES, Pair, RequestView, RouterSpec, WorkerView
from diptych.policy.drains import Drains
from diptych.policy.handover import Candidate, Handovers
from diptych.policy.links import NONE, Links
from diptych.policy.messages import Role


class Placement:
    """Chooses by what the router knows; all of it is the router's."""

    def __init__(
        self, spec: RouterSpec, workers: dict[str, WorkerView], links: Links, handovers: Handovers, drains: Drains
    ):
        self.spec = spec
        self.workers = workers
        self.links = links
        self.handovers = handovers
        self.drains = drains

    def num_paths(self) -> int:
        """Ways a new request can go: mixed workers, and connected pairs of a prefill and a decode worker."""
        prefills, decodes = self.able((Role.PREFILL,)), self.able((Role.DECODE,))
        return len(self.able((Role.MIXED,))) + sum(self.links.stand(p.name, d.name) for p in prefills for d in decodes)

    def able(self, roles: tuple[Role, ...], num_tokens: int = 0) -> list[WorkerView]:
        """Who may be given a request of that size."""
        able = [view for view in self.workers.values() if view.role in roles and view.fits(num_tokens)]
        return [view for view in able if view.name not in self.drains] if self.drains else able

    def pick(self, request: RequestView, able: list[WorkerView]) -> WorkerView | None:
        """The best of these by the chosen policy."""
        return min(able, key=lambda view: SCORES[self.spec.policy](view, request), default=None)

    def pair(self, request: RequestView, num_tokens: int, need: int) -> Pair | None:
        """The best decode worker that has a prefill worker for it, and the best of those.

        Who keeps its KV is taken before anyone else, and a pair that was not tried yet before one that gave it up.
        """
        prefills, decodes = self.able((Role.PREFILL,), num_tokens), self.able((Role.DECODE,), need)
        keepers = [view for view in prefills if view.name == request.keeper]
        pick = partial(self._half, request, num_tokens, len(prefills)) if self.handovers.known() else None
        for able, without in ((keepers, request.failed), (prefills, request.failed), (prefills, NONE)):
            if pair := self.links.best(able, decodes, pick or (lambda half, _: self.pick(request, half)), without):
                return pair
        return None

    def _half(
        self, request: RequestView, num_tokens: int, num_sources: int, able: list[WorkerView], decode: WorkerView | None
    ) -> WorkerView | None:
        """The best prefill worker for a decode worker, or the best of these decode workers: load, and the way there."""
        if self.spec.policy == "round-robin":
            return self.pick(request, able)
        ranked = []
        for view in able:
            load, *ties = SCORES[self.spec.policy](view, request)
            target = decode or view
            num_bytes = max(num_tokens - target.matched(request.submitted.hashes), 0) * target.token_bytes
            if decode:
                away_s = self.handovers.seconds(num_bytes, view.name, decode.name)
            else:
                away_s = self.handovers.least_seconds(num_bytes, view.name, num_sources)
            detour = self.handovers.detour(away_s)
            ranked.append(((load + detour, *ties), Candidate(view.name, load, detour, away_s)))
        ranked.sort(key=lambda each: each[0])
        if not decode:
            request.ranked = [candidate for _, candidate in ranked[:2]]
        return self.workers[ranked[0][1].worker] if ranked else None

    def disaggregates(self, request: RequestView, mixed: WorkerView) -> bool:
        """Is a pair worth its handover for this request? Only if there is enough prompt to compute."""
        uncached = request.submitted.num_prompt - mixed.matched(request.submitted.hashes)
        return uncached > self.spec.disaggregate_above

    def stand_in(self, request: RequestView, need: int) -> WorkerView | None:
        """Where no pair can take it: a prefill or a decode worker that does both parts, the keeper of its KV first.

        An answer that has begun is not given up as long as anybody can hold it; a new request is taken so where nobody
        else is up.
        """
        if request.attempt == 0 and self.num_paths():
            return None
        able = self.able((Role.PREFILL, Role.DECODE), need)
        return self.pick(request, [view for view in able if view.name == request.keeper] or able)
