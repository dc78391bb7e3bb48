"""A decode worker of the bundled model dies in the middle of its answers: every one goes on as if nothing had been.

Greedy, sampled, with penalties, up to a stop string, as JSON of a schema, with log-probabilities: each is asked for
twice in turns, so that both decode workers have one of each, and compared with what an undisturbed run wrote.
"""

import asyncio
import os
import signal
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from clusters import connected, live, settled

from diptych.serve.supervisor import Supervisor

pytest.importorskip("llguidance")

NUM_TOKENS = 400
ITEMS = {"type": "array", "items": {"type": "string", "minLength": 4, "maxLength": 10}, "minItems": 16, "maxItems": 16}
SCHEMA = {"type": "object", "properties": {"animals": ITEMS}, "required": ["animals"], "additionalProperties": False}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "seed": 7},
    "penalties": {
        "temperature": 0.7, "seed": 8, "frequency_penalty": 0.5, "presence_penalty": 0.3,
        "extra_body": {"repetition_penalty": 1.2, "ignore_eos": True},
    },
    "logprobs": {"temperature": 0.8, "seed": 9, "logprobs": 2},
    "JSON": {
        "temperature": 0.8, "seed": 10,
        "extra_body": {"response_format": {"type": "json_schema", "json_schema": {"name": "zoo", "schema": SCHEMA}}},
    },
}  # fmt: skip


@dataclass
class Told:
    """What a client has of an answer."""

    text: str = ""
    chunks: int = 0
    end: str | None = None
    logprobs: list[float] = field(default_factory=list)


async def ask(client: openai.AsyncOpenAI, how: dict[str, Any], told: Told) -> None:
    """Read one answer to its end."""
    base = {"model": "diptych-demo", "prompt": "Tell me a story about a fox.", "max_tokens": NUM_TOKENS}
    stream = await client.completions.create(**base, stream=True, **({"extra_body": {"ignore_eos": True}} | how))
    async for chunk in stream:
        for choice in chunk.choices:
            told.text += choice.text
            told.chunks += bool(choice.text)
            told.end = choice.finish_reason or told.end
            told.logprobs += choice.logprobs.token_logprobs if choice.logprobs else []


async def undisturbed(client: openai.AsyncOpenAI) -> dict[str, Told]:
    """Every kind once; the stop string is one that comes late."""
    told = {kind: Told() for kind in KINDS}
    await asyncio.gather(*(ask(client, how, told[kind]) for kind, how in KINDS.items()))
    text = told["penalties"].text
    KINDS["stop string"] = KINDS["penalties"] | {"stop": [text[-60:-25]]}
    told["stop string"] = Told()
    await ask(client, KINDS["stop string"], told["stop string"])
    assert told["stop string"].end == "stop" and told["stop string"].chunks > 60
    return told


async def run(supervisor: Supervisor) -> None:
    url = f"{supervisor.url}/v1"
    async with connected(supervisor) as frontend, openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        wanted = await undisturbed(client)
        told = [(kind, Told()) for kind in reversed(KINDS) for _ in range(2)]
        asking = [asyncio.ensure_future(ask(client, KINDS[kind], each)) for kind, each in told]
        (row,) = [row for row in await frontend.workers() if row["id"] == "d0"]
        while min(each.chunks for _, each in told) < 4:
            await asyncio.sleep(0.001)
        over = [kind for kind, each in told if each.end]
        assert not over, f"{over} were over before anybody died"
        os.kill(row["pid"], signal.SIGKILL)
        await asyncio.wait_for(asyncio.gather(*asking), 60)
        for kind, each in told:
            assert (kind, each.text, each.end) == (kind, wanted[kind].text, wanted[kind].end)
            assert each.logprobs == pytest.approx(wanted[kind].logprobs, abs=1e-3)
        assert "".join(wanted["JSON"].text.split()).startswith('{"animals":["')
        await settled(frontend)
        _, report = await frontend.health()
        kept = report["resumed"]["kept"]
        assert kept["requests"] == len(KINDS) and kept["prompt_tokens"] == 0 and kept["most_written"] <= 32


def test_every_kind_of_answer_survives_its_worker() -> None:
    with live(prefill=1, decode=2, chunk=128, kv_memory="32MiB", router={"policy": "round-robin"}) as supervisor:
        asyncio.run(run(supervisor))
