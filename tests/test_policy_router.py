"""The router's decisions: whom it picks, whom it turns away, and how a request survives a lost worker."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from diptych.policy.books import PolicyName, RouterSpec
from diptych.policy.membership import Dismiss, Drain, Drained, LinkDown, LinkUp
from diptych.policy.messages import (
    MAX_ATTEMPTS,
    Cancel,
    Cancelled,
    Failed,
    Finish,
    Place,
    Progress,
    Reason,
    Reject,
    Role,
    RouterOrder,
    Submitted,
    Tick,
    WorkerLost,
    WorkerUp,
    attempt_id,
    request_of,
)
from diptych.policy.router import Router

HASHES = tuple(bytes([i]) for i in range(8))


def router(workers: str = "mm", num_blocks: int = 100, **spec: object) -> Router:
    """A router with workers `m0`, `p1`, ... of 16-token blocks."""
    made = Router(replace(RouterSpec(), **spec))  # type: ignore[arg-type]
    for i, kind in enumerate(workers):
        role = {"m": Role.MIXED, "p": Role.PREFILL, "d": Role.DECODE}[kind]
        made.on(0.0, WorkerUp(f"{kind}{i}", 0, role, num_blocks, 16))
    return made


def submit(
    made: Router, request: int, num_prompt: int = 128, max_new: int = 16, **details: object
) -> list[RouterOrder]:
    event = Submitted(request, num_prompt, max_new, HASHES[: num_prompt // 16])
    return made.on(0.0, replace(event, **details))  # type: ignore[arg-type]


def places(orders: list[RouterOrder]) -> list[tuple[str, int, Role, str]]:
    return [(o.worker, o.rid, o.part, o.peer) for o in orders if isinstance(o, Place)]


def test_attempts_have_ids_of_their_own() -> None:
    assert request_of(attempt_id(7, 3)) == 7 and attempt_id(7, 3) != attempt_id(7, 4) != attempt_id(8, 0)


# --- whom it picks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["round-robin", "least-loaded", "prefix-aware"])
def test_equal_requests_are_spread_evenly(policy: PolicyName) -> None:
    made = router("mmm", policy=policy)
    names = [places(submit(made, i, hashes=()))[0][0] for i in range(9)]
    assert sorted(names) == ["m0"] * 3 + ["m1"] * 3 + ["m2"] * 3


def test_least_loaded_avoids_the_long_prompt() -> None:
    made = router("mm", policy="least-loaded")
    assert places(submit(made, 1, 1000))[0][0] == "m0"
    assert [places(submit(made, i, 100))[0][0] for i in (2, 3, 4)] == ["m1"] * 3


def test_prefix_aware_goes_where_the_prefix_is_unless_that_worker_is_busy() -> None:
    made = router("mm")
    submit(made, 1)
    made.on(0.0, Finish(attempt_id(1, 0), "m0", Reason.STOP))
    submit(made, 2, hashes=(b"x",) * 8)
    made.on(0.0, Finish(attempt_id(2, 0), "m1", Reason.STOP))
    assert places(submit(made, 3))[0][0] == "m0", "it holds all of the prompt"
    submit(made, 4, 1000, hashes=HASHES)
    assert places(submit(made, 5))[0][0] == "m1", "but now it has a thousand tokens to compute first"


def test_a_pair_hears_of_the_decode_side_first() -> None:
    made = router("pd")
    rid = attempt_id(1, 0)
    assert places(submit(made, 1)) == [("d1", rid, Role.DECODE, "p0"), ("p0", rid, Role.PREFILL, "d1")]


def test_in_a_mixture_only_long_prompts_are_disaggregated() -> None:
    made = router("pdm", disaggregate_above=100)
    assert [part for _, _, part, _ in places(submit(made, 1, 90))] == [Role.MIXED]
    assert [part for _, _, part, _ in places(submit(made, 2, 101, hashes=()))] == [Role.DECODE, Role.PREFILL]
    cached = submit(made, 3, 90 + 64, hashes=HASHES)
    assert [part for _, _, part, _ in places(cached)] == [Role.MIXED], "what is cached there counts for nothing"


def test_what_writes_nothing_goes_to_whoever_computes_prompts_and_to_nobody_else() -> None:
    made = router("pdm", policy="least-loaded")
    placed = [places(submit(made, i, max_new=0, hashes=()))[0] for i in range(4)]
    assert [(part, peer) for _, _, part, peer in placed] == [(Role.PREFILL, "")] * 4
    assert [worker for worker, *_ in placed] == ["p0", "m2", "p0", "m2"]
    decode = made.workers["d1"]
    assert (decode.num_requests, decode.held_tokens, decode.prompt_tokens, decode.last_placed) == (0, 0, 0, 0)
    for number, (worker, rid, _, _) in enumerate(placed):
        assert made.on(0.0, Finish(rid, worker, Reason.COMPUTED)) == []
        assert number not in made.requests
    assert made.num["finished"] == 4
    assert all((v.num_requests, v.held_tokens, v.prompt_tokens) == (0, 0, 0) for v in made.workers.values())


def test_it_follows_its_prefix_like_any_other() -> None:
    made = router("pp")
    made.on(0.0, Finish(places(submit(made, 1, max_new=0))[0][1], "p0", Reason.COMPUTED))
    submit(made, 2, 16, max_new=0, hashes=(b"x",))
    assert places(submit(made, 3, max_new=0))[0][0] == "p0"


def test_it_is_placed_again_where_its_worker_is_lost() -> None:
    made = router("ppd")
    ((worker, rid, *_),) = places(submit(made, 1, max_new=0))
    assert made.on(0.0, WorkerLost("d2")) == [], "it has nothing to do with decode workers"
    again = places(made.on(0.0, WorkerLost(worker)))
    assert again == [("p1", rid + 1, Role.PREFILL, "")]
    assert made.on(0.0, Finish(rid, worker, Reason.COMPUTED)) == [] and 1 in made.requests, "that attempt is over"
    assert made.on(0.0, Cancelled(1)) == [Cancel("p1", rid + 1)]


def test_it_is_turned_away_where_it_does_not_fit_or_nobody_computes_prompts() -> None:
    (reject,) = submit(router("pd", num_blocks=4), 1, 65, max_new=0)
    assert isinstance(reject, Reject) and reject.status == 400
    (reject,) = submit(router("d"), 1, 16, max_new=0)
    assert isinstance(reject, Reject) and reject.status == 503


# --- whom it turns away ----------------------------------------------------------------------------------------------


def test_too_many_queued_tokens_get_429() -> None:
    """Counted until the first token; a prompt that is alone is taken, however long."""
    made = router("m", max_queued_tokens=300)
    assert places(submit(made, 1, num_prompt=500))
    [reject] = submit(made, 2, num_prompt=16)
    assert isinstance(reject, Reject) and reject.status == 429 and "queued" in reject.why
    made.on(1.0, Progress(attempt_id(1, 0)))
    assert places(submit(made, 3, num_prompt=200, hashes=())) and places(submit(made, 4, num_prompt=100, hashes=()))
    assert isinstance(submit(made, 5, num_prompt=16, hashes=())[0], Reject)


def test_too_many_requests_get_429() -> None:
    made = router(max_requests=2)
    submit(made, 1)
    submit(made, 2)
    (reject,) = submit(made, 3)
    assert isinstance(reject, Reject) and (reject.request, reject.status) == (3, 429)
    made.on(0.0, Cancelled(1))
    assert places(submit(made, 4))


def test_what_fits_nowhere_gets_400_and_says_why() -> None:
    for workers in ("mm", "pd"):
        assert places(submit(router(workers), 1, 1600, 1)), "the last token's KV is never written"
        (reject,) = submit(router(workers), 1, 1600, 2)
        assert isinstance(reject, Reject) and reject.status == 400 and "1602 tokens" in reject.why


def test_without_a_worker_503() -> None:
    (reject,) = submit(router(""), 1)
    assert isinstance(reject, Reject) and reject.status == 503


@pytest.mark.parametrize("workers", ["p", "d", "pp", "dd"])
def test_without_a_pair_whoever_is_up_does_both_parts(workers: str) -> None:
    made = router(workers)
    assert not made.num_paths() and made.serves()
    assert places(submit(made, 1)) == [(f"{workers[0]}0", attempt_id(1, 0), Role.MIXED, "")]
    (reject,) = submit(made, 2, num_prompt=10_000)
    assert isinstance(reject, Reject) and reject.status == 503


def test_who_keeps_its_kv_goes_on_alone_where_nobody_else_decodes() -> None:
    made = router("ppd")
    submit(made, 1)
    made.on(0.0, Progress(attempt_id(1, 0)))
    made.on(0.0, Finish(attempt_id(1, 0), "p0", Reason.HANDED_OVER))
    orders = made.on(0.0, WorkerLost("d2", ((attempt_id(1, 0), 9),)))
    assert places(orders) == [("p0", attempt_id(1, 1), Role.MIXED, "")]
    made.on(0.0, Finish(attempt_id(1, 1), "p0", Reason.LENGTH))
    assert made.num["finished"] == 1 and made.workers["p0"].num_requests == made.workers["p0"].held_tokens == 0


def test_an_answer_that_outgrew_the_prefill_workers_goes_on_where_it_fits() -> None:
    """A prompt of 36 tokens fits there; with 30 tokens of its answer it does not, and a decode worker holds it all."""
    made = Router()
    for name, role, num_blocks in (("p0", Role.PREFILL, 3), ("d0", Role.DECODE, 64), ("d1", Role.DECODE, 64)):
        made.on(0.0, WorkerUp(name, 0, role, num_blocks, 16))
    made.on(0.0, Submitted(1, 36, 100, ()))
    made.on(0.0, Progress(attempt_id(1, 0)))
    made.on(0.0, Finish(attempt_id(1, 0), "p0", Reason.HANDED_OVER))
    lost, other = ("d0", "d1") if made.requests[1].decode == "d0" else ("d1", "d0")
    orders = made.on(9.0, WorkerLost(lost, ((attempt_id(1, 0), 30),)))
    assert places(orders) == [(other, attempt_id(1, 1), Role.MIXED, "")]


def test_two_deaths_in_a_row_do_not_take_it_from_its_keeper() -> None:
    """What gave up with a decode worker that died since is no reason to leave who keeps its KV."""
    made = router("ppddd")
    submit(made, 1)
    made.on(0.0, Progress(attempt_id(1, 0)))
    keeper, first = made.requests[1].keeper, made.requests[1].decode
    made.on(0.1, Failed(attempt_id(1, 0), keeper, 1, Reason.PEER_LOST))
    made.on(0.1, WorkerLost(first, ()))
    made.on(0.2, WorkerUp(first, 1, Role.DECODE, 64, 16))
    assert made.requests[1].failed == set()
    second = made.requests[1].decode
    made.on(0.3, LinkDown(keeper, second))
    made.on(0.3, Failed(attempt_id(1, 1), second, 5, Reason.PEER_LOST))
    assert made.requests[1].failed == {(keeper, second)} and made.requests[1].keeper == keeper
    made.on(0.4, LinkUp(keeper, second))
    assert made.requests[1].failed == set()


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_lost_worker_means_a_new_attempt_with_the_tokens_the_client_has() -> None:
    made = router("mm")
    submit(made, 1)
    made.on(0.0, Progress(attempt_id(1, 0)))
    (place,) = made.on(1.0, WorkerLost("m0", ((attempt_id(1, 0), 5),)))
    assert isinstance(place, Place)
    assert (place.worker, place.rid, place.num_tokens, place.num_prompt) == ("m1", attempt_id(1, 1), 133, 128)


def test_what_an_old_attempt_still_says_is_not_heard() -> None:
    made = router("mm")
    submit(made, 1)
    made.on(0.0, WorkerLost("m0", ()))
    old = attempt_id(1, 0)
    for event in (Progress(old), Finish(old, "m0", Reason.STOP), Failed(old, "m0", 9, Reason.REFUSED)):
        assert made.on(0.0, event) == []
    assert made.num["finished"] == 0 and 1 in made.requests


def test_a_broken_pair_is_taken_back_from_both_and_placed_anew() -> None:
    made = router("pd")
    submit(made, 1)
    rid = attempt_id(1, 0)
    orders = made.on(0.0, Failed(rid, "d1", 1, Reason.PEER_LOST))
    assert orders[2:] == [Cancel("p0", rid), Cancel("d1", rid)], "they hear of the new attempt first"
    assert [o.num_tokens for o in orders[:2] if isinstance(o, Place)] == [129, 129]


def test_a_request_goes_on_where_its_kv_is_kept() -> None:
    made = router("ppd")
    submit(made, 1)
    made.on(0.0, Progress(attempt_id(1, 0)))
    made.on(0.0, Finish(attempt_id(1, 0), "p0", Reason.HANDED_OVER))
    for number in range(2, 6):
        submit(made, number)  # p0 is the busier one now, if anything
    made.on(0.0, WorkerUp("d9", 0, Role.DECODE, 100, 16))
    orders = made.on(0.0, WorkerLost("d2", ((attempt_id(1, 0), 40),)))
    (place,) = [o for o in orders if isinstance(o, Place) and o.part == Role.PREFILL and request_of(o.rid) == 1]
    assert place.worker == "p0" and place.num_tokens == place.num_prompt + 40


def test_what_a_lost_prefill_worker_kept_is_lost_with_it() -> None:
    made = router("ppd")
    submit(made, 1)
    made.on(0.0, Progress(attempt_id(1, 0)))
    made.on(0.0, Finish(attempt_id(1, 0), "p0", Reason.HANDED_OVER))
    made.on(0.0, WorkerLost("p0", ()))
    made.on(0.0, WorkerUp("p0", 1, Role.PREFILL, 1, 16))
    orders = made.on(0.0, Failed(attempt_id(1, 0), "d2", 3, Reason.PEER_LOST))
    assert {o.worker for o in orders if isinstance(o, Place)} == {"p1", "d2"}


def test_a_prefill_worker_lost_after_the_first_token_is_the_decode_sides_affair() -> None:
    made = router("ppd")
    submit(made, 1)
    made.on(0.0, Progress(attempt_id(1, 0)))
    assert made.on(0.0, WorkerLost("p0", ((attempt_id(1, 0), 1),))) == []
    submit(made, 2)
    orders = made.on(0.0, WorkerLost("p1", ()))
    assert places(orders) == [("d2", attempt_id(2, 1), Role.MIXED, "")], "no prefill worker is left"
    assert made.num["failed"] == 0 and list(made.requests) == [1, 2]


def test_an_answer_that_ends_with_its_first_token_is_called_off_at_the_decode_side() -> None:
    made = router("pd")
    submit(made, 1)
    rid = attempt_id(1, 0)
    assert made.on(0.0, Finish(rid, "p0", Reason.STOP)) == [Cancel("d1", rid)]
    assert made.num["finished"] == 1


def test_a_handover_takes_the_request_off_the_prefill_worker() -> None:
    made = router("pd")
    submit(made, 1)
    made.on(0.0, Progress(attempt_id(1, 0)))
    made.on(0.0, Finish(attempt_id(1, 0), "p0", Reason.HANDED_OVER))
    assert made.workers["p0"].num_requests == 0 and made.workers["d1"].num_requests == 1
    assert made.on(0.0, Cancelled(1)) == [Cancel("d1", attempt_id(1, 0))]


def test_attempts_are_not_endless() -> None:
    made = router("m")
    submit(made, 1)
    orders: list[RouterOrder] = []
    for attempt in range(MAX_ATTEMPTS):
        orders = made.on(0.0, Failed(attempt_id(1, attempt), "m0", 0, Reason.REFUSED))
    assert isinstance(orders[0], Reject) and orders[0].status == 503 and made.num["failed"] == 1


# --- connections and drains ------------------------------------------------------------------------------------------


def test_a_pair_without_a_connection_gets_nothing() -> None:
    made = router("ppd")
    made.on(0.0, LinkDown("d2", "p0"))
    assert [places(submit(made, i))[1][0] for i in (1, 2)] == ["p1", "p1"] and made.num_paths() == 1
    made.on(0.0, LinkDown("p1", "d2"))
    assert [part for _, _, part, _ in places(submit(made, 3))] == [Role.MIXED], "one of them alone"
    made.on(0.0, LinkUp("d2", "p0"))
    assert places(submit(made, 4))[1][0] == "p0"


def test_a_broken_pair_is_not_tried_again_while_there_is_another() -> None:
    made = router("ppdd", policy="round-robin")
    submit(made, 1)
    tried = {("p0", "d2")}
    for attempt in range(3):
        orders = made.on(0.0, Failed(attempt_id(1, attempt), "d2", 0, Reason.PEER_LOST))
        (decode, _, _, prefill), _ = places(orders)
        tried.add((prefill, decode))
    assert len(tried) == 4
    assert places(made.on(0.0, Failed(attempt_id(1, 3), "d2", 0, Reason.PEER_LOST))), "then any of them"


def test_a_worker_that_drains_gets_nothing_more_and_goes_when_nothing_is_left() -> None:
    made = router("mm")
    submit(made, 1)
    assert made.on(1.0, Drain("m0", 60.0)) == [] and made.next_deadline() == 61.0
    assert {places(submit(made, i))[0][0] for i in (2, 3, 4)} == {"m1"}
    assert made.on(2.0, Finish(attempt_id(1, 0), "m0", Reason.STOP)) == [Drain("m0", 0.0)]
    assert made.on(3.0, Drained("m0")) == [Dismiss("m0")]
    assert made.on(3.0, WorkerLost("m0")) == [] and made.next_deadline() is None


def test_what_is_left_when_its_time_is_up_goes_on_elsewhere() -> None:
    made = router("mm")
    submit(made, 1)
    made.on(1.0, Drain("m0", 60.0))
    assert made.on(60.9, Tick()) == [] and made.on(61.0, Tick()) == [Dismiss("m0")]
    (place,) = made.on(61.0, WorkerLost("m0", ((attempt_id(1, 0), 5),)))
    assert isinstance(place, Place) and (place.worker, place.num_tokens) == ("m1", 133)


def test_an_idle_worker_is_asked_at_once_and_a_stranger_never() -> None:
    made = router("mm")
    assert made.on(0.0, Drain("m0", 60.0)) == [Drain("m0", 0.0)]
    assert made.on(0.0, Drain("m7", 60.0)) == [] and made.on(0.0, Drained("m1")) == []


def test_the_last_of_a_kind_is_needed() -> None:
    made = router("ppd")
    assert not made.needs("p0") and made.needs("d2")
    made.on(0.0, Drain("p0", 60.0))
    assert made.needs("p1")


def test_a_new_worker_is_used_at_once() -> None:
    made = router("pd", policy="least-loaded")
    submit(made, 1)
    made.on(0.0, WorkerUp("d9", 0, Role.DECODE, 100, 16))
    assert places(submit(made, 2))[0][0] == "d9"


# --- its books -------------------------------------------------------------------------------------------------------


class Books(RuleBasedStateMachine):
    """Whatever happens in whatever order, no request is lost and no load stays in the books of an idle cluster."""

    def __init__(self) -> None:
        super().__init__()
        self.router = router("mpd", num_blocks=20, disaggregate_above=64, max_requests=6)
        self.next = 0
        self.rejected: set[int] = set()

    def on(self, event: object) -> None:
        for order in self.router.on(0.0, event):  # type: ignore[arg-type]
            if isinstance(order, Reject):
                assert order.request not in self.rejected
                self.rejected.add(order.request)

    def some(self, which: int) -> int:
        return list(self.router.requests)[which % len(self.router.requests)]

    @rule(num_prompt=st.integers(1, 400), max_new=st.integers(0, 20))
    def submit(self, num_prompt: int, max_new: int) -> None:
        self.next += 1
        self.on(Submitted(self.next, num_prompt, max_new, HASHES[: num_prompt // 16]))

    @precondition(lambda self: self.router.requests)
    @rule(which=st.integers(0, 99), what=st.sampled_from(["progress", "cancel", "stop", "hand over", "fail"]))
    def proceed(self, which: int, what: str) -> None:
        number = self.some(which)
        view = self.router.requests[number]
        last = view.decode or view.prefill
        match what:
            case "progress" if view.submitted.max_new and view.life.at not in ("handover", "decoding"):
                self.on(Progress(view.rid))
            case "cancel":
                self.on(Cancelled(number))
            case "stop":
                self.on(Finish(view.rid, last, Reason.STOP if view.submitted.max_new else Reason.COMPUTED))
            case "hand over" if view.prefill and view.life.at == "handover":
                self.on(Finish(view.rid, view.prefill, Reason.HANDED_OVER))
            case "fail":
                self.on(Failed(view.rid, last, 1, Reason.PEER_LOST))

    @rule(name=st.sampled_from(["m0", "p1", "d2"]))
    def lose(self, name: str) -> None:
        if name in self.router.workers:
            emitted = tuple((view.rid, 1) for view in self.router.requests.values())
            self.on(WorkerLost(name, emitted))

    @rule(name=st.sampled_from(["m0", "p1", "d2"]))
    def come_back(self, name: str) -> None:
        if name not in self.router.workers:
            role = {"m": Role.MIXED, "p": Role.PREFILL, "d": Role.DECODE}[name[0]]
            self.on(WorkerUp(name, 1, role, 20, 16))

    @invariant()
    def conserved(self) -> None:
        num = self.router.num
        ended = num["finished"] + num["rejected"] + num["cancelled"] + num["failed"]
        assert num["submitted"] == ended + len(self.router.requests) == self.next
        assert len(self.rejected) == num["rejected"] + num["failed"]
        for view in self.router.workers.values():
            mine = [r for r in self.router.requests.values() if view.name in (r.prefill, r.decode)]
            assert view.num_requests == len(mine)
            assert view.held_tokens == sum(
                r.submitted.num_prompt + r.submitted.max_new for r in mine if r.decode == view.name
            )
            charged = [r for r in self.router.requests.values() if r.charged == view.name]
            assert view.prompt_tokens == sum(r.uncached for r in charged)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
