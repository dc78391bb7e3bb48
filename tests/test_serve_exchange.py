"""What keeps an exchange from outliving its client: the pieces, and clients that leave a real server."""

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serve_doubles import FakeFrontend, byte_level_tokenizer, serving

from diptych.serve.exchange import all_of, while_connected
from diptych.serve.frontend import Chunk, Job
from diptych.serve.text import Text

TEXT = Text(byte_level_tokenizer())


class Client:
    """An ASGI `receive` of a client that leaves when told to."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}


class Work:
    """Work that lasts until it is cancelled, and says so."""

    def __init__(self) -> None:
        self.cancelled = False

    async def run(self) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def fail() -> None:
    raise ValueError("broken")


def test_work_ends_when_the_client_leaves() -> None:
    async def main() -> None:
        client, work = Client(), Work()
        asyncio.get_running_loop().call_later(0.01, client.left.set)
        await asyncio.wait_for(while_connected(client.receive, work.run()), 5)
        assert work.cancelled

    asyncio.run(main())


def test_an_error_of_the_work_is_raised_and_nothing_is_left_running() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="broken"):
            await while_connected(Client().receive, fail())
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_work_ends_when_the_server_stops() -> None:
    async def main() -> None:
        work = Work()
        outer = asyncio.ensure_future(while_connected(Client().receive, work.run()))
        await asyncio.sleep(0.01)
        outer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await outer
        await asyncio.sleep(0.01)
        assert work.cancelled

    asyncio.run(main())


def test_the_first_error_cancels_the_others() -> None:
    async def main() -> None:
        work = Work()
        with pytest.raises(ValueError, match="broken"):
            await all_of([work.run(), fail()])
        assert work.cancelled

    asyncio.run(main())


def test_results_come_in_order() -> None:
    async def give(value: int, after_s: float) -> int:
        await asyncio.sleep(after_s)
        return value

    async def main() -> None:
        assert await all_of([give(1, 0.02), give(2, 0.0)]) == [1, 2]
        assert await all_of([give(3, 0.0)]) == [3]

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", ["hello", ["hello", "world"]], ids=["one", "two"])
def test_a_client_that_leaves_is_cancelled(stream: bool, prompts: Any) -> None:
    def endless(job: Job) -> Iterator[Chunk]:
        while True:
            yield Chunk(TEXT.encode("a"))

    with serving(TEXT, FakeFrontend(endless, gap_s=0.01)) as live:
        body = json.dumps({"prompt": prompts, "max_tokens": 5000, "stream": stream}).encode()
        with socket.create_connection(live.url.removeprefix("http://").split(":")) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            if stream:
                assert b"200 OK" in raw.recv(1000)
            assert live.wait_until(lambda: bool(live.frontend.jobs))
        number = 1 if prompts == "hello" else 2
        assert live.wait_until(lambda: len(live.frontend.cancelled) == number)
        assert sorted(live.frontend.cancelled) == list(range(1, number + 1))
        assert f'diptych_requests_total{{reason="cancelled"}} {number}.0' in httpx.get(f"{live.url}/metrics").text


def test_a_client_that_leaves_before_the_first_token() -> None:
    with serving(TEXT, FakeFrontend(gap_s=60)) as live:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.url}/v1/completions", json={"prompt": "hello", "stream": True}, timeout=0.2)
        assert live.wait_until(lambda: live.frontend.cancelled == [1])
