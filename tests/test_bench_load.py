"""Loads are a function of their arguments, and are sent when they say."""

import asyncio
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import cast

import msgspec
import pytest

from diptych.bench.client import Client, Record
from diptych.bench.load import CHAT, LONG, Mix, Shot, closed_loop, mixed, open_loop, poisson, regular

MIX = Mix(rate=20.0, long_every_s=1.0)


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


def test_the_same_seed_gives_the_same_load() -> None:
    assert mixed(MIX, 5.0, 7, 512) == mixed(MIX, 5.0, 7, 512)
    assert mixed(MIX, 5.0, 7, 512) != mixed(MIX, 5.0, 8, 512)


def test_a_longer_load_begins_like_a_shorter_one() -> None:
    short, long = poisson(CHAT, 20.0, 2.0, 1, 512), poisson(CHAT, 20.0, 4.0, 1, 512)
    assert long[: len(short)] == short and len(long) > len(short)


def test_lengths_and_ids_are_as_asked() -> None:
    for shot in mixed(MIX, 5.0, 1, 300):
        shape = CHAT if shot.kind == "chat" else LONG
        assert shape.prompt[0] <= len(shot.prompt) <= shape.prompt[1]
        assert shape.answer[0] <= shot.max_tokens <= shape.answer[1]
        assert min(shot.prompt) >= 0 and max(shot.prompt) < 300


def test_no_two_prompts_share_a_block() -> None:
    shots = mixed(MIX, 5.0, 1, 512)
    assert len({shot.prompt[:16] for shot in shots}) == len(shots)


def test_arrivals_are_memoryless_at_their_rate() -> None:
    times = [shot.at_s for shot in poisson(CHAT, 50.0, 40.0, 3, 8)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(times) == pytest.approx(2000, rel=0.1)
    # An exponential distribution's mean equals its deviation, and 1 - 1/e of it lies below the mean.
    assert sum(gap < 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.632, abs=0.05)


def test_long_prompts_come_at_fixed_gaps() -> None:
    assert [shot.at_s for shot in regular(LONG, 2.0, 6.0, 1, 8)] == [1.0, 3.0, 5.0]


def test_a_mix_is_in_order_of_time_and_either_part_may_be_missing() -> None:
    shots = mixed(MIX, 5.0, 1, 512, {"model": "m"})
    assert [shot.at_s for shot in shots] == sorted(shot.at_s for shot in shots)
    assert all(msgspec.json.decode(shot.body())["model"] == "m" for shot in shots)
    assert {shot.kind for shot in mixed(Mix(0.0, 1.0), 5.0, 1, 512)} == {"long"}
    assert {shot.kind for shot in mixed(Mix(5.0, 0.0), 5.0, 1, 512)} == {"chat"}


def test_an_open_loop_does_not_wait_for_answers() -> None:
    fake = FakeClient(takes_s=0.2)
    records = asyncio.run(open_loop(as_client(fake), shots_at(0.0, 0.01, 0.02)))
    assert fake.most == 3
    dues = [record.due_s for record in records]
    assert [later - earlier for earlier, later in pairwise(dues)] == pytest.approx([0.01, 0.01])


def test_what_does_not_end_is_cut_off() -> None:
    records = asyncio.run(open_loop(as_client(FakeClient(takes_s=60.0)), shots_at(0.0, 0.01), drain_s=0.05))
    assert [record.error for record in records] == ["unfinished"] * 2


def test_a_closed_loop_keeps_so_many_under_way() -> None:
    fake = FakeClient(takes_s=0.01)
    endless = (Shot(0.0, "chat", (1,), 1) for _ in count())
    records = asyncio.run(closed_loop(as_client(fake), endless, concurrency=3, seconds=0.1))
    assert fake.most == 3 and len(records) > 3


def test_a_closed_loop_ends_with_its_shots() -> None:
    records = asyncio.run(closed_loop(as_client(FakeClient()), shots_at(0, 0, 0, 0, 0), concurrency=2, seconds=60.0))
    assert len(records) == 5
