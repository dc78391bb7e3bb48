"""Records where there is no pair, and of what writes nothing, is cancelled, or is seen in the middle."""

import asyncio

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
