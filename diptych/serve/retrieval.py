"""The endpoints that read and do not write: embeddings, scores, reranking and classes.

Each reads and checks its body, turns it into jobs and hands them to `Vectors`. Their jobs go to workers that compute
prompts, and to nobody else. Not responsible for what bodies and replies look like (`pooling.py`).
"""

import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.routing import Route

from diptych.engine.executor import Pooling
from diptych.serve import fields, openai, pooling
from diptych.serve.frontend import Frontend, Job, ModelCard
from diptych.serve.intake import aside, wants_trace
from diptych.serve.metrics import Metrics
from diptych.serve.pooling import ClassifyCall, EmbeddingCall, RerankCall, ScoreCall
from diptych.serve.text import Text
from diptych.serve.vectors import Vector, Vectors

C = TypeVar("C", EmbeddingCall, ScoreCall, RerankCall, ClassifyCall)
Endpoint = Callable[[Request], Awaitable[Vectors]]

_EMBEDDING = msgspec.json.Decoder(EmbeddingCall)
_SCORE = msgspec.json.Decoder(ScoreCall)
_RERANK = msgspec.json.Decoder(RerankCall)
_CLASSIFY = msgspec.json.Decoder(ClassifyCall)


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What these endpoints need."""

    frontend: Frontend
    text: Text
    card: ModelCard
    metrics: Metrics
    body: Callable[[Request], Awaitable[bytes]]  # reads a request's body, within its limits

    def routes(self) -> list[Route]:
        """Every path; those without `/v1` are vLLM's, `/v2/rerank` is Cohere's."""
        paths: dict[str, Endpoint] = {
            "/v1/embeddings": self.embeddings,
            "/v1/score": self.score,
            "/score": self.score,
            "/v1/rerank": self.rerank,
            "/rerank": self.rerank,
            "/v2/rerank": self.rerank,
            "/v1/classify": self.classify,
            "/classify": self.classify,
        }
        return [Route(path, endpoint, methods=["POST"]) for path, endpoint in paths.items()]

    async def embeddings(self, request: Request) -> Vectors:
        """`POST /v1/embeddings`."""
        arrived, ident = time.perf_counter(), f"embd-{uuid.uuid4().hex}"
        call, size = await self._read(request, _EMBEDDING)
        how = pooling.check_embeds(self.card, call.pooling, call.dimensions)
        encode = partial(pooling.encode, call.input, call.add_special_tokens is not False, self.text, self.card)
        prompts = await aside(size, encode)
        normalize = call.normalize is not False and call.use_activation is not False

        def render(vectors: list[Vector]) -> bytes:
            data = [
                pooling.Embedding(
                    i, pooling.encoded(pooling.shaped(v, call.dimensions, normalize), call.encoding_format)
                )
                for i, v in enumerate(vectors)
            ]
            return self._reply(pooling.Embeddings, ident, call, data, prompts)

        return await self._vectors(prompts, how, call, self._sender(request, render, arrived, ident))

    async def score(self, request: Request) -> Vectors:
        """`POST /v1/score`."""
        arrived, ident = time.perf_counter(), f"score-{uuid.uuid4().hex}"
        call, size = await self._read(request, _SCORE)
        firsts, seconds, names = pooling.sides(call)
        compared = await aside(size, partial(pooling.compare, firsts, seconds, self.text, self.card, names))

        def render(vectors: list[Vector]) -> bytes:
            scores = compared.scores(vectors, call.use_activation is not False)
            data = [pooling.Score(i, score) for i, score in enumerate(scores)]
            return self._reply(pooling.Scores, ident, call, data, compared.prompts)

        return await self._vectors(
            compared.prompts, compared.pooling, call, self._sender(request, render, arrived, ident)
        )

    async def rerank(self, request: Request) -> Vectors:
        """`POST /v1/rerank`."""
        arrived, ident = time.perf_counter(), f"rerank-{uuid.uuid4().hex}"
        call, size = await self._read(request, _RERANK)
        pooling.refuse_cuts(max_tokens_per_doc=call.max_tokens_per_doc)
        texts = [given if isinstance(given, str) else given.text for given in call.documents]
        compare = partial(pooling.compare, [call.query], texts, self.text, self.card, ("query", "documents"))
        compared = await aside(size, compare)

        def render(vectors: list[Vector]) -> bytes:
            scores = compared.scores(vectors, call.use_activation is not False)
            best = sorted(range(len(texts)), key=lambda i: -scores[i])[: call.top_n or len(texts)]
            shown = call.return_documents is not False
            results = [pooling.Ranked(i, scores[i], pooling.Document(texts[i]) if shown else None) for i in best]
            name = call.model or self.card.name
            return msgspec.json.encode(pooling.Reranked(ident, name, results, pooling.usage(compared.prompts)))

        return await self._vectors(
            compared.prompts, compared.pooling, call, self._sender(request, render, arrived, ident)
        )

    async def classify(self, request: Request) -> Vectors:
        """`POST /v1/classify`."""
        arrived, ident = time.perf_counter(), f"classify-{uuid.uuid4().hex}"
        call, size = await self._read(request, _CLASSIFY)
        pooling.check_classifies(self.card)
        encode = partial(pooling.encode, call.input, call.add_special_tokens is not False, self.text, self.card)
        prompts = await aside(size, encode)
        labels = self.card.labels

        def render(vectors: list[Vector]) -> bytes:
            data = []
            for i, vector in enumerate(vectors):
                shown = vector if call.use_activation is False else pooling.probabilities(vector)
                data.append(pooling.Class(i, labels[int(vector.argmax())], shown.tolist(), len(labels)))
            return self._reply(pooling.Classes, ident, call, data, prompts)

        return await self._vectors(prompts, "labels", call, self._sender(request, render, arrived, ident))

    async def _read(self, request: Request, decoder: msgspec.json.Decoder[C]) -> tuple[C, int]:
        """The checked body, and how long it is."""
        body = await self.body(request)
        call = openai.decoded(decoder, body)
        openai.check_model(call.model, self.card)
        pooling.refuse_cuts(truncate_prompt_tokens=call.truncate_prompt_tokens)
        fields.check(body, type(call))
        return call, len(body)

    async def _vectors(
        self, prompts: list[list[int]], how: Pooling, call: C, made_of: Callable[[list[Job]], Vectors]
    ) -> Vectors:
        make = partial(pooling.jobs, prompts, how, call, self.card)
        return made_of(await aside(sum(map(len, prompts)), make))  # hashing takes its time too

    def _sender(
        self, request: Request, render: Callable[[list[Vector]], bytes], arrived: float, ident: str
    ) -> Callable[[list[Job]], Vectors]:
        """What makes a reply of jobs."""
        traced = wants_trace(request)
        return lambda jobs: Vectors(jobs, render, self.frontend, self.metrics, arrived, ident, traced)

    def _reply(self, kind: Any, ident: str, call: C, data: list[Any], prompts: Sequence[Sequence[int]]) -> bytes:
        """The body of those replies that are OpenAI's lists."""
        name = call.model or self.card.name
        return msgspec.json.encode(kind(ident, int(time.time()), name, data, pooling.usage(prompts)))
