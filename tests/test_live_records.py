"""Records where there is no pair, and of what writes nothing, is cancelled, or is seen in the middle; and every log."""

import asyncio
import contextlib
import json
import os
import signal
from typing import Any

import httpx
import pytest
from clusters import answer_of, connected, live

from diptych.engine.executor import Sampling
from diptych.serve.frontend import Job, Label
from diptych.serve.supervisor import Supervisor

PACED = {"base_ms": 2.0, "new_token_us": 20.0, "context_token_us": 0.0, "kv_bytes_per_token": 64, "vocab": 300}


def test_records_of_a_mixed_worker() -> None:
    async def run(supervisor: Supervisor) -> None:
        async with connected(supervisor) as frontend:
            job = Job([7] * 300, 5, Sampling(), label=Label("cmpl-a", "me", 0))
            await answer_of(frontend.submit(job)[1])
            (record,) = await frontend.records("cmpl-a")
            assert record["handover"] is record["transfer"] is None and record["ttft"]["seen_by"] == "router"
            assert sum(record["ttft"]["parts"].values()) == record["ttft"]["us"]
            (attempt,) = record["attempts"]
            assert (attempt["prefill"], attempt["decode"], attempt["steps"]) == ("m0", "", 3)
            assert (attempt["computed_tokens"], record["output_tokens"]) == (300, 5)

            vector = Job([7] * 20, 0, Sampling(pooling="last"), label=Label("embd-a"))
            await frontend.submit(vector)[1].get()
            (record,) = await frontend.records("embd-a")
            assert (record["state"], record["ttft"]) == ("computed", None)
            assert record["attempts"][0]["computed_tokens"] == 20

            number, stream = frontend.submit(Job([8] * 20, 5000, Sampling(), label=Label("cmpl-b", "me", 0)))
            await stream.get()
            (record,) = await frontend.records("cmpl-b")
            assert record["state"] == "running" and record["ttft"]["us"] > 0
            frontend.cancel(number)
            (record,) = await frontend.records("cmpl-b")
            assert record["state"] == "cancelled" and record["output_tokens"] >= 1
            assert [found["id"] for found in await frontend.records("me")] == ["cmpl-a", "cmpl-b"]
            assert await frontend.records("nobody") == []

    with live(mixed=1, engine="paced", chunk=128, paced=PACED) as supervisor:
        asyncio.run(run(supervisor))


def test_a_request_is_followed_through_every_log_by_the_id_in_its_header(capfd: pytest.CaptureFixture[str]) -> None:
    flags = {"engine": "paced", "paced": PACED, "prefill": 1, "decode": 2, "log_level": "debug", "log_format": "json"}
    body = {"prompt": list(range(200)), "max_tokens": 300, "stream": True, "ignore_eos": True}
    headers = {"x-request-id": "mine-42"}
    with live(**flags) as supervisor, httpx.Client(timeout=60) as http:
        with http.stream("POST", f"{supervisor.url}/v1/completions", json=body, headers=headers) as reply:
            pieces = reply.iter_lines()
            for _ in range(20):
                next(pieces)
            (record,) = http.get(f"{supervisor.url}/requests/mine-42").json()["requests"]
            lost = record["attempts"][0]["decode"]
            rows = http.get(f"{supervisor.url}/workers").json()["workers"]
            os.kill(next(row["pid"] for row in rows if row["id"] == lost), signal.SIGKILL)
            assert [line for line in pieces if line][-1] == "data: [DONE]"
        (record,) = http.get(f"{supervisor.url}/requests/mine-42").json()["requests"]
    lines: list[dict[str, Any]] = []
    for line in capfd.readouterr().err.splitlines():
        with contextlib.suppress(ValueError):  # the supervisor's own words
            lines.append(json.loads(line))
    found = [line for line in lines if line.get("request") == "mine-42"]
    assert {line["process"] for line in found} == {"api", "router", "p0", "d0", "d1"}
    attempts = [attempt["attempt"] for attempt in record["attempts"]]
    assert [line["attempt"] for line in found if line["process"] in ("d0", "d1")] == attempts
    (moved,) = [line for line in found if line["message"] == "a request goes on elsewhere: worker_lost"]
    assert moved["attempt"] == attempts[1] and moved["level"] == "info" and moved["token"] > 0
    (ended,) = [line for line in found if line["process"] == "api"]
    assert ended["reply"] == record["id"] and ended["output_tokens"] == 300
