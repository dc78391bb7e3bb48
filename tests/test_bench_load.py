"""Loads are a function of their arguments, and are sent when they say."""

import asyncio
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from typing import cast

import msgspec
import pytest

from diptych.bench.client import Client, Record
from diptych.bench.load import Shot, closed_loop, open_loop, shots
from diptych.sim.load import Load
from diptych.sim.trace import Row, replayed
from diptych.sim.workload import Arrival, parse_lengths

LOAD = Load(
    rate=20.0,
    prompt=parse_lengths("64-200"),
    output=parse_lengths("4-9"),
    long_every_s=1.0,
    long_prompt=parse_lengths("500-600"),
    long_output=parse_lengths("2-3"),
    seconds=5.0,
)


def drawn(load: Load, vocab: int = 512) -> list[Shot]:
    return list(shots(load.arrivals(), vocab))


@dataclass
class FakeClient:
    """Answers everything after `takes_s`; remembers how many it had at a time."""

    takes_s: float = 0.0
    bodies: list[bytes] = field(default_factory=list)
    now: int = 0
    most: int = 0

    async def send(self, body: bytes, record: Record) -> Record:
        self.bodies.append(body)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.takes_s)
        except asyncio.CancelledError:
            record.error = "unfinished"
            raise
        finally:
            self.now -= 1
        return record


def as_client(fake: FakeClient) -> Client:
    return cast(Client, fake)


def shots_at(*times: float) -> list[Shot]:
    return [Shot(at_s, "chat", (1, 2), 3) for at_s in times]


def test_the_same_load_gives_the_same_requests() -> None:
    assert drawn(LOAD) == drawn(LOAD) != drawn(replace(LOAD, seed=8))


def test_a_longer_load_begins_like_a_shorter_one() -> None:
    short, long = drawn(LOAD), drawn(replace(LOAD, seconds=10.0))
    assert long[: len(short)] == short and len(long) > len(short)


def test_lengths_and_ids_are_as_asked() -> None:
    for shot in drawn(LOAD, 300):
        low, high = (64, 200) if shot.kind == "chat" else (500, 600)
        assert low <= len(shot.prompt) <= high and 2 <= shot.max_tokens <= 9
        assert min(shot.prompt) >= 0 and max(shot.prompt) < 300


def test_no_two_prompts_share_a_block() -> None:
    prompts = drawn(LOAD)
    assert len({tuple(shot.prompt[:16]) for shot in prompts}) == len(prompts)


def test_prompts_share_a_prefix_where_their_arrivals_do() -> None:
    trace = [Row(0.0, 1300, 4, (0, 1, 2)), Row(0.0, 1100, 4, (0, 1, 3)), Row(0.0, 600, 4, (5, 1))]
    one, two, other = (shot.prompt for shot in shots(replayed(trace), 50_000))
    assert one[:1024] == two[:1024], "two hash ids are 1,024 tokens"
    assert not set(one[1024:1040]) & set(two[1024:1040])
    assert one[:512] != other[:512] and one[512:600] != other[512:600], "the same id after another one is another text"


def test_a_chat_says_words() -> None:
    (shot,) = shots([Arrival(0.0, 20, 5, 5)], 100, {"model": "m"}, chat=True)
    body = msgspec.json.decode(shot.body())
    (message,) = body["messages"]
    assert len(message["content"].split()) == 20 and "prompt" not in body and body["model"] == "m"


def test_a_field_that_is_none_is_left_out() -> None:
    (shot,) = shots([Arrival(0.0, 20, 5, 5)], 100, {"ignore_eos": None})
    assert "ignore_eos" not in msgspec.json.decode(shot.body())


def test_an_open_loop_does_not_wait_for_answers() -> None:
    fake = FakeClient(takes_s=0.2)
    records = asyncio.run(open_loop(as_client(fake), shots_at(0.0, 0.01, 0.02)))
    assert fake.most == 3
    dues = [record.due_s for record in records]
    assert [later - earlier for earlier, later in pairwise(dues)] == pytest.approx([0.01, 0.01])


def test_what_does_not_end_is_cut_off() -> None:
    records = asyncio.run(open_loop(as_client(FakeClient(takes_s=60.0)), shots_at(0.0, 0.01), drain_s=0.05))
    assert [record.error for record in records] == ["unfinished"] * 2


def test_a_load_that_is_given_up_leaves_nothing_running() -> None:
    async def main(closed: bool) -> list[Record]:
        fake, records = FakeClient(takes_s=60.0), list[Record]()
        shots = shots_at(0.0, 0.0)
        sending = (
            closed_loop(as_client(fake), shots, 2, 60.0, records=records)
            if closed
            else open_loop(as_client(fake), shots, records=records)
        )
        task = asyncio.create_task(sending)
        while fake.now < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert fake.now == 0
        return records

    for closed in (False, True):
        assert [record.error for record in asyncio.run(main(closed))] == ["unfinished"] * 2


def test_a_closed_loop_keeps_so_many_under_way() -> None:
    fake = FakeClient(takes_s=0.01)
    endless = (Shot(0.0, "chat", (1,), 1) for _ in count())
    records = asyncio.run(closed_loop(as_client(fake), endless, concurrency=3, seconds=0.1))
    assert fake.most == 3 and len(records) > 3


def test_a_closed_loop_ends_with_its_shots() -> None:
    records = asyncio.run(closed_loop(as_client(FakeClient()), shots_at(0, 0, 0, 0, 0), concurrency=2, seconds=60.0))
    assert len(records) == 5
