"""The seam between the API process and the router process: what one submits and what comes back.

Only facts and protocols: `serve/api.py` is written against `Frontend`, the driver implements it over a socket,
tests put a double behind it. Not responsible for HTTP, text or the wire.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import msgspec

from diptych.engine.executor import Sampling, Score
from diptych.modelfacts import Task
from diptych.policy.messages import Reason
from diptych.serve.wire import Note


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the API has to know of the model that is served.

    `max_tokens` bounds prompt and answer together. `fingerprint` and `layout` salt the block hashes, so that KV is
    shared only where it means the same.
    """

    name: str
    max_tokens: int
    vocab_size: int
    block_size: int
    stop_ids: tuple[int, ...] = ()  # the model's end of sequence; off with `ignore_eos`
    fingerprint: str = ""
    layout: str = ""
    aliases: tuple[str, ...] = ()
    created: int = 0
    structured: bool = False  # the workers can hold an answer to a grammar
    scored: bool = True  # they know log-probabilities
    task: Task = "generate"
    pooling: str = "last"  # how its embeddings are made where a request does not say; "" for a way that we do not have
    width: int = 0  # numbers in an embedding
    matryoshka: tuple[int, ...] | None = None  # shorter embeddings it was trained for: None no, () any length
    labels: tuple[str, ...] = ()  # of a checkpoint that classifies


@dataclass(frozen=True, slots=True)
class Label:
    """What a client knows a job by: the id of its reply, its `X-Request-Id`, and which of several answers it is."""

    ident: str = ""
    caller: str = ""
    index: int = 0

    @property
    def name(self) -> str:
        """What log lines call it: by what its client sent or was sent in a header, and which further answer it is."""
        name = self.caller or self.ident
        return f"{name}/{self.index}" if name and self.index else name


NO_LABEL = Label()


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt to be continued. `hashes` are those of its full blocks, `root` the one before the first.

    A lower `priority` goes first. With `max_new` 0 nothing is written, and `sampling.pooling` says what is
    wanted instead. `label` is for people: nothing depends on it.
    """

    tokens: list[int]
    max_new: int
    sampling: Sampling
    priority: int = 0
    root: bytes = b""
    hashes: tuple[bytes, ...] = ()
    label: Label = NO_LABEL


class Chunk(msgspec.Struct, frozen=True, gc=False):  # it can be in no cycle, and there is one for each token
    """The next tokens of an answer. The last chunk has a `reason` or an `error` (HTTP status, why).

    `tokens` includes the stop token that ended it. `cached`: prompt tokens whose KV was found, said at the latest in
    the last chunk. `scores`: one for each token, where asked for; `prompt_scores`: from the second token of the
    prompt on, with the first token of the answer. `vector`: what came of a job that writes nothing, float32, with
    the end.
    """

    tokens: list[int]
    reason: Reason | None = None
    error: tuple[int, str] | None = None
    cached: int = 0
    scores: tuple[Score, ...] = ()
    prompt_scores: tuple[Score, ...] = ()
    vector: bytes = b""


class DrainCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /workers/{id}/drain`. `force`: also where the worker is the last of its kind."""

    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = None  # what is left then goes on elsewhere
    force: bool = False


class Stream(Protocol):
    """The chunks of one request, in order. Nobody calls `get` after the last one."""

    async def get(self) -> Chunk:
        """Wait for the next chunk. Ends in bounded time: where the router is gone, with an error chunk."""


class Frontend(Protocol):
    """The router, as an API process sees it. May raise any `DiptychError`, e.g. `Unavailable`."""

    def submit(self, job: Job) -> tuple[int, Stream]:
        """Send a job off; returns its request id and where its answer will appear. Never waits."""

    def cancel(self, request: int) -> None:
        """Stop a request whose last chunk has not come; whatever still comes for it is dropped."""

    def note(self, note: Note) -> None:
        """Say how a client saw its answer, for the record. Never waits."""

    async def records(self, name: str = "", limit: int = 1) -> list[dict[str, Any]]:
        """The records of the jobs labelled so; without a name the last ones, newest first."""

    async def metrics(self) -> tuple[list[dict[str, Any]], str]:
        """The rows of `workers`, and what the router counts, as the text of a scrape."""

    async def workers(self) -> list[dict[str, Any]]:
        """One row a worker: `id, role, pid, state, running, waiting`, `blocks: {state: number}`.

        `kv: {bytes, seconds, transfers, failed, moved}` counts, since its start, what this worker read from its peers;
        `leases: {offered, expected, kept}` the requests whose KV it holds for a peer, or a peer for it.
        """

    async def drain(self, worker: str, timeout_s: float | None, force: bool) -> dict[str, Any]:
        """Take a worker out of service: what came of it. Raises NotFound, or Conflict for one that is needed.

        `timeout_s` None: as long as the cluster gives its workers.
        """

    async def health(self) -> tuple[bool, dict[str, Any]]:
        """True where those who were asked answer, some of them at least; and the details (`health.py`)."""
