"""What the tests of `serve/` share: a small tokenizer, a double for the router process, a running HTTP server."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from diptych.engine.executor import Score
from diptych.policy.messages import Reason
from diptych.serve.api import Settings, make_app
from diptych.serve.frontend import Chunk, Job, ModelCard
from diptych.serve.server import make_server, port_of
from diptych.serve.text import Text
from diptych.serve.wire import Note

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, this is a small model", "STOP END stop"] * 3
SPECIALS = ["<|end|>", "<|user|>", "<|system|>", "<|assistant|>"]


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE: every text can be written, anything outside ASCII in several tokens a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_checkpoint(folder: Path) -> Path:
    """The files of a checkpoint that `Text.load` reads."""
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "<|end|>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def card_of(text: Text, max_tokens: int = 12_000) -> ModelCard:
    """The card of a model with this tokenizer."""
    return ModelCard("tiny", max_tokens, text.vocab_size, block_size=16, stop_ids=text.stop_ids, aliases=("alias",))


def echo(job: Job) -> Iterator[Chunk]:
    """A model that says its prompt again, token by token, and then ends."""
    for token in job.tokens[: job.max_new - 1]:
        yield Chunk([token])
    if len(job.tokens) < job.max_new and job.sampling.stop_ids:
        yield Chunk([job.sampling.stop_ids[0]], Reason.STOP, cached=3)
    else:
        yield Chunk(job.tokens[job.max_new - 1 : job.max_new], Reason.LENGTH, cached=3)


def score_of(token: int, top: int) -> Score:
    """What a model that echoes thinks of a token: likely, and `top` others less so."""
    ids = np.array([token, token, *range(10, 9 + top)][: 1 + top], np.int32)
    values = np.array([-0.5, -0.5, *[-3.0] * 20][: 1 + top], np.float32)
    return Score(1, ids.tobytes(), values.tobytes())


def scoring_echo(job: Job) -> Iterator[Chunk]:
    """A model that says its prompt again, and how sure it is."""
    how = job.sampling
    prompt = tuple(score_of(t, how.prompt_logprobs) for t in job.tokens[1:]) if how.prompt_logprobs >= 0 else ()
    for number, token in enumerate(job.tokens[: job.max_new]):
        scores = (score_of(token, how.logprobs),) if how.logprobs >= 0 else ()
        yield Chunk([token], scores=scores, prompt_scores=() if number else prompt, cached=16 * (number == 0))
    yield Chunk([], Reason.LENGTH)


def vector_of(tokens: list[int]) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """What a model that pools makes of a prompt: a few numbers that say how often each token id modulo 4 is there."""
    return np.array([1 + sum(token % 4 == i for token in tokens) for i in range(4)], np.float32)


def pooling(job: Job, num_labels: int = 1) -> Iterator[Chunk]:
    """A model that makes a vector of its prompt (a classifier: its first numbers as logits)."""
    vector = vector_of(job.tokens)
    if job.sampling.pooling == "labels":
        vector = vector[:num_labels] - 5
    yield Chunk([], Reason.COMPUTED, cached=2, vector=vector.tobytes())


def saying(*chunks: Chunk) -> Callable[[Job], Iterable[Chunk]]:
    """A model that always answers with these chunks."""
    return lambda job: chunks


@dataclass
class FakeFrontend:
    """The router as an API process sees it, in memory. Waits `gap_s` before each chunk."""

    answer: Callable[[Job], Iterable[Chunk]] = echo
    gap_s: float = 0.0
    jobs: list[Job] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    routers: str = ""
    well: bool = True
    silent: list[dict[str, Any]] = field(default_factory=list)  # pairs
    refuse: Exception | None = None

    def submit(self, job: Job) -> tuple[int, "asyncio.Queue[Chunk]"]:
        if self.refuse:
            raise self.refuse
        self.jobs.append(job)
        queue: asyncio.Queue[Chunk] = asyncio.Queue()
        task = asyncio.ensure_future(self._play(job, queue))
        self._tasks = [*getattr(self, "_tasks", []), task]
        return len(self.jobs), queue

    async def _play(self, job: Job, queue: "asyncio.Queue[Chunk]") -> None:
        for chunk in self.answer(job):
            await asyncio.sleep(self.gap_s)
            queue.put_nowait(chunk)

    def cancel(self, request: int) -> None:
        self.cancelled.append(request)

    def note(self, note: Note) -> None:
        self.notes.append(note)

    async def records(self, name: str = "", limit: int = 1) -> list[dict[str, Any]]:
        if self.refuse:
            raise self.refuse
        labels = [job.label for job in reversed(self.jobs) if name in ("", job.label.ident, job.label.caller)]
        noted = {(note.ident, note.index): note.finish for note in self.notes}
        found = [{"id": one.ident, "index": one.index, "finish": noted.get((one.ident, one.index))} for one in labels]
        return found[:limit] if not name else found[::-1]

    async def metrics(self) -> tuple[list[dict[str, Any]], str]:
        return self.rows, self.routers

    async def workers(self) -> list[dict[str, Any]]:
        return self.rows

    async def drain(self, worker: str, timeout_s: float | None, force: bool) -> dict[str, Any]:
        if self.refuse:
            raise self.refuse
        return {"id": worker, "state": "draining", "timeout_s": timeout_s, "forced": force}

    async def health(self) -> tuple[bool, dict[str, Any]]:
        return self.well, {"workers": len(self.rows), "silent": self.silent}


@dataclass
class Live:
    """A server on a free port of this machine."""

    url: str
    frontend: FakeFrontend
    server: uvicorn.Server

    def wait_until(self, true: Callable[[], bool], limit_s: float = 3.0) -> bool:
        """Poll until something the server does in its own thread has happened."""
        deadline = time.monotonic() + limit_s
        while not true() and time.monotonic() < deadline:
            time.sleep(0.005)
        return true()


@contextlib.contextmanager
def serving(
    text: Text,
    frontend: FakeFrontend | None = None,
    settings: Settings | None = None,
    max_tokens: int = 12_000,
    **card: Any,
) -> Iterator[Live]:
    """Run the API with a real uvicorn in a thread. `card`: what its model's card says otherwise."""
    frontend = frontend or FakeFrontend()
    server = make_server(make_app(frontend, text, replace(card_of(text, max_tokens), **card), settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "uvicorn did not start"
        time.sleep(0.005)
    try:
        yield Live(f"http://127.0.0.1:{port_of(server)}", frontend, server)
    finally:
        server.should_exit = True
        thread.join(10)
