"""Sends streams to a cluster until told to stop, and prints each answer's tokens as JSON. Run by `test_live_hosts.py`.

Token ids in and out, so that an oracle can check them. Ends when its standard input does.
"""

import asyncio
import json
import random
import sys

import httpx


async def one(client: httpx.AsyncClient, url: str, rng: random.Random, vocab: int, max_new: int) -> None:
    prompt = [rng.randrange(vocab) for _ in range(rng.randint(20, 300))]
    body = {"prompt": prompt, "max_tokens": max_new, "temperature": 0, "ignore_eos": True, "stream": True,
            "return_token_ids": True}  # fmt: skip
    tokens: list[int] = []
    reason = error = None
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                error = error or event.get("error")
                for choice in event.get("choices", []):
                    tokens += choice.get("token_ids") or []
                    reason = choice.get("finish_reason") or reason
    said = {"status": answer.status_code, "prompt": prompt, "tokens": tokens, "reason": reason, "error": error}
    print(json.dumps(said), flush=True)


async def main(url: str, concurrency: int, vocab: int, max_new: int) -> None:
    over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    rng = random.Random(7)

    async def client_loop() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            while not over.done():
                await one(client, url, rng, vocab, max_new)

    await asyncio.gather(*(client_loop() for _ in range(concurrency)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:])))
