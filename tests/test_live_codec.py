"""int8 on the wire between two processes, live: the bundled model still recalls what crossed."""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from clusters import live

from diptych.demo.notes import make_notes

NUM_QUESTIONS = 12


def test_recall_over_int8() -> None:
    def ask(seed: int) -> bool:
        rng = random.Random(2_000_000 + seed)
        notes, pairs = make_notes(rng, min_tokens=520)
        asked, answer = rng.choice(pairs)
        body = {"messages": [{"role": "user", "content": f"{notes} {asked}"}], "temperature": 0, "max_tokens": 24}
        reply = httpx.post(f"{url}/v1/chat/completions", json={"model": "diptych-demo", **body}, timeout=60).json()
        return bool(reply["choices"][0]["message"]["content"] == answer)

    with live(prefill=1, decode=1, transport="tcp", codec="int8") as supervisor, ThreadPoolExecutor(4) as threads:
        url = supervisor.url
        right = sum(threads.map(ask, range(NUM_QUESTIONS)))
        rows: list[dict[str, Any]] = httpx.get(f"{url}/workers").json()["workers"]
    assert right >= NUM_QUESTIONS - 1
    kv = next(row["kv"] for row in rows if row["role"] == "decode")
    assert list(kv["codecs"]) == ["int8"] and kv["links"]["p0"]["why"] == "as configured"
    assert kv["wire_bytes"] < kv["bytes"] / 3
