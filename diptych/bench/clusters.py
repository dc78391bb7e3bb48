"""A cluster brought up for one measurement, loaded, measured and taken down.

The API process is given a tokenizer in which every token id is a word of its own, so that every token of an answer is
one event of the stream whatever the model writes; weights and shapes are the model's. Not responsible for what is
compared with what (`rounds.py`).
"""

import asyncio
import contextlib
import http.client
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from diptych.bench.client import Client, Record
from diptych.bench.load import Shot, open_loop
from diptych.bench.processes import Stopwatch, Usage
from diptych.config import DEMO, Cluster
from diptych.modelfacts import locate, read_facts
from diptych.serve.supervisor import Supervisor

READY_S = 60.0
DRAIN_S = 20.0


class Measured(msgspec.Struct, frozen=True):
    """One load on one cluster."""

    records: list[Record]
    usage: Usage
    workers: list[dict[str, Any]]  # the rows of /workers at the end


def vocab_of(cluster: Cluster) -> int:
    """How many token ids its model knows."""
    return cluster.paced.vocab if cluster.engine == "paced" else read_facts(cluster.folder).vocab


@contextlib.contextmanager
def worded(cluster: Cluster) -> Iterator[Cluster]:
    """The same cluster with a tokenizer of plain words, in a temporary folder of links to the model's files."""
    with tempfile.TemporaryDirectory(prefix="diptych-bench-") as name:
        folder = Path(name) / ("paced" if cluster.engine == "paced" else model_name(cluster))
        folder.mkdir()
        if cluster.engine == "paced":
            (folder / "config.json").write_text("{}")
        else:
            _link_model(locate(cluster.folder), folder)
        (folder / "tokenizer.json").write_bytes(_words(vocab_of(cluster)))
        yield msgspec.structs.replace(cluster, model=str(folder), host="127.0.0.1", port=0)


def measure(cluster: Cluster, shots: Sequence[Shot], warmup: Sequence[Shot] = (), drain_s: float = DRAIN_S) -> Measured:
    """Start the cluster, send the warm-up and then the shots (open loop), stop it. One cluster lives at a time."""
    with Supervisor(cluster) as supervisor:
        supervisor.wait_ready(READY_S)
        pids = {child.name: child.process.pid for child in supervisor.children if child.process}
        records, usage = asyncio.run(_drive(supervisor.port, pids, shots, warmup, drain_s))
        return Measured(records, usage, _workers(supervisor.port))


async def _drive(
    port: int, pids: dict[str, int], shots: Sequence[Shot], warmup: Sequence[Shot], drain_s: float
) -> tuple[list[Record], Usage]:
    client = Client("127.0.0.1", port)
    await client.warm(8)
    await open_loop(client, warmup, drain_s)
    stopwatch = Stopwatch(pids | {"client": os.getpid()})
    records = await open_loop(client, shots, drain_s)
    usage = stopwatch.lap()
    await client.close()
    return records, usage


def _workers(port: int) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/workers")
        rows: list[dict[str, Any]] = msgspec.json.decode(connection.getresponse().read())["workers"]
        return rows
    except (OSError, http.client.HTTPException, msgspec.DecodeError, KeyError):
        return []
    finally:
        connection.close()


def model_name(cluster: Cluster) -> str:
    """What to call its model in a table."""
    if cluster.engine == "paced":
        return "paced"
    return "demo" if cluster.folder == str(DEMO) else Path(cluster.model).name


def _link_model(model: Path, folder: Path) -> None:
    """Everything a model is loaded from, without its tokenizer."""
    for file in model.iterdir():
        if file.is_file() and (file.suffix == ".safetensors" or file.name.endswith("config.json")):
            if not file.name.startswith("tokenizer"):
                (folder / file.name).symlink_to(file.resolve())
        elif file.name.endswith(".index.json"):
            (folder / file.name).symlink_to(file.resolve())


def _words(vocab: int) -> bytes:
    """A tokenizer.json with one word for each id."""
    words = {f"w{i}": i for i in range(vocab)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    spaces = {"type": "Whitespace"}
    return msgspec.json.encode({"version": "1.0", "added_tokens": [], **parts, "pre_tokenizer": spaces, "model": model})
