"""`python -m diptych.bench URL`: a load on a server that already runs, ours or any that speaks OpenAI's completions.

Not responsible for starting servers or for comparing them (`benchmarks/modes.py` does both).
"""

import argparse
import asyncio
from itertools import chain, count
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console

from diptych.bench.client import Client, Record
from diptych.bench.load import Mix, Shape, Shot, closed_loop, mixed, open_loop
from diptych.bench.report import by_kind, table
from diptych.bench.rounds import environment, write_json
from diptych.bench.slo import parse_slo
from diptych.errors import ConfigError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("url", help="like http://127.0.0.1:8000")
    parser.add_argument("--model", help="the model's name, where the server wants one")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long requests are sent")
    parser.add_argument("--rate", type=float, default=4.0, help="chats per second, at random times")
    parser.add_argument("--long-every", type=float, default=0.0, help="seconds between long prompts (default: none)")
    parser.add_argument("--concurrency", type=int, help="closed loop: so many requests at a time, as fast as they go")
    parser.add_argument("--chat-prompt", type=parse_range, default=(64, 200), metavar="FROM-TO", help="tokens")
    parser.add_argument("--chat-answer", type=parse_range, default=(64, 128), metavar="FROM-TO", help="tokens")
    parser.add_argument("--long-prompt", type=parse_range, default=(2000, 4000), metavar="FROM-TO", help="tokens")
    parser.add_argument("--long-answer", type=parse_range, default=(16, 32), metavar="FROM-TO", help="tokens")
    parser.add_argument("--vocab", type=int, default=256, help="prompts are random token ids below this")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--slo", type=parse_slo, default=parse_slo(""), help="like ttft=0.5,tpot=0.05")
    parser.add_argument("--out", type=Path, help="JSON of the summaries")


def run(arguments: argparse.Namespace) -> int:
    """Send the load and print what came of it; 1 if any request failed."""
    found = by_kind(asyncio.run(_send(arguments)), arguments.slo)
    console = Console()
    console.print(table(found, f"{arguments.url}, {arguments.seconds:g} s, seed {arguments.seed}"))
    for error, times in found["all"].errors.items():
        console.print(f"{times} x {error}", markup=False)
    if arguments.out:
        write_json(arguments.out, {"about": environment(), "url": arguments.url, "summaries": found})
    return 1 if found["all"].errors else 0


def parse_range(text: str) -> tuple[int, int]:
    """`64-200`, or one number; argparse turns the ValueError into its message."""
    low, _, high = text.partition("-")
    found = int(low), int(high or low)
    if not 1 <= found[0] <= found[1]:
        raise ValueError(text)
    return found


async def _send(arguments: argparse.Namespace) -> list[Record]:
    url = urlsplit(arguments.url)
    if url.scheme != "http" or not url.hostname:
        raise ConfigError(f"{arguments.url!r} is not a URL like http://127.0.0.1:8000")
    client = Client(url.hostname, url.port or 80, f"{url.path.rstrip('/').removesuffix('/v1')}/v1/completions")
    chat = Shape("chat", arguments.chat_prompt, arguments.chat_answer)
    mix = Mix(arguments.rate, arguments.long_every, chat, Shape("long", arguments.long_prompt, arguments.long_answer))
    fields = {"model": arguments.model} if arguments.model else {}

    def load(seed: int) -> list[Shot]:
        return mixed(mix, arguments.seconds, seed, arguments.vocab, fields)

    shots = load(arguments.seed)
    if not shots:
        raise ConfigError("no request would be sent in that time; raise --rate, --long-every or --seconds")
    try:
        if arguments.concurrency:
            endless = chain(shots, chain.from_iterable(load(arguments.seed + i) for i in count(1)))
            return await closed_loop(client, endless, arguments.concurrency, arguments.seconds)
        return await open_loop(client, shots)
    finally:
        await client.close()
