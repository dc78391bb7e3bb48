"""The HTTP face: OpenAI's endpoints and a few of our own, on Starlette. Never imports torch or transformers.

Reads and checks a request, turns it into jobs and hands them to an `Exchange`; nothing is submitted before everything
was checked. Whatever goes wrong leaves as OpenAI's error envelope. Not responsible for placing or computing (behind
`Frontend`), for the dialect's details (`openai.py`) or for what flags said (`Settings` comes from the caller).
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from typing import Any, TypeVar, cast

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from diptych import __version__
from diptych.engine.executor import Sampling
from diptych.errors import BadRequest, DiptychError, NotFound, Overloaded, Unavailable
from diptych.serve import openai
from diptych.serve.calls import Format
from diptych.serve.chat import encode_chat
from diptych.serve.exchange import Exchange, Order
from diptych.serve.frontend import DrainCall, Frontend, Job, Label, ModelCard
from diptych.serve.guard import Guard
from diptych.serve.intake import aside, check_origin, check_size, read_body, wants_trace
from diptych.serve.metrics import CONTENT_TYPE, Metrics
from diptych.serve.outermost import Outermost
from diptych.serve.records import MAX_SHOWN, NUM_KEPT
from diptych.serve.retrieval import Retrieval
from diptych.serve.schema import document
from diptych.serve.structured import grammar_of
from diptych.serve.text import Text, prompt_hashes
from diptych.serve.tokenize import detokenize, tokenize
from diptych.serve.tools import check_tools, format_of, grammar_of_calls, shown

T = TypeVar("T")

_DRAIN = msgspec.json.Decoder(DrainCall)


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits of the API process."""

    max_body_bytes: int = 32 * 2**20
    max_prompts: int = 256  # in one completion request
    body_timeout_s: float = 60.0  # how long a body may take to come
    retry_after_s: int = 1
    tool_parser: str | None = None  # how the model writes calls: hermes, llama3 or none; None: as its template says
    api_key: str | None = None  # what requests must carry; None: nothing
    cors_origins: tuple[str, ...] = ()  # of web pages that may ask; "*" is all
    control_timeout_s: float = 2.0  # how long /health, /workers and /metrics wait for the router


@dataclass(frozen=True, slots=True)
class Api:
    """What every endpoint needs."""

    frontend: Frontend
    text: Text
    card: ModelCard
    settings: Settings
    metrics: Metrics
    calls: Format | None  # how the model writes them

    # --- generation ---

    async def completions(self, request: Request) -> Exchange:
        """`POST /v1/completions`."""
        return await self._generate(request, chat=False)

    async def chat_completions(self, request: Request) -> Exchange:
        """`POST /v1/chat/completions`."""
        return await self._generate(request, chat=True)

    async def _generate(self, request: Request, chat: bool) -> Exchange:
        arrived = time.perf_counter()
        call = openai.parse(await self.body(request), chat)
        if chat:
            check_tools(call)
        openai.check_model(call.model, self.card)
        openai.check_writes(self.card)
        openai.check_ids(call, self.card)
        openai.check_scored(call, self.card)
        prompts = [await self._encode_chat(call)] if chat else await self._encode_prompts(call)
        if len(prompts) * openai.num_answers(call) > self.settings.max_prompts:
            raise BadRequest(f"at most {self.settings.max_prompts} answers in one request", "n")
        sampling = self._sampling(call, chat)
        jobs: list[Job] = []
        for tokens in prompts:
            jobs += await aside(4 * len(tokens), partial(self._jobs, call, tokens, sampling, chat))
        options = call.stream_options or openai.StreamOptions()
        ident = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        caller = request.scope.get("request_id", "")
        jobs = [replace(job, label=Label(ident, caller, index)) for index, job in enumerate(jobs)]
        order = Order(
            chat=chat,
            jobs=jobs,
            stops=openai.stop_strings(call),
            streamed=bool(call.stream),
            with_usage=bool(options.include_usage),
            with_usage_always=bool(options.continuous_usage_stats),
            with_token_ids=bool(call.return_token_ids),
            num_each=openai.num_answers(call),
            num_best=call.n or 1 if call.best_of else None,
            with_logprobs=openai.num_logprobs(call) >= 0,
            calls=self.calls if chat and shown(call) else None,
            echoes=tuple(self._echoed(call, prompts)),
            silent=openai.writes_nothing(call),
            traced=bool(call.diptych_trace) or wants_trace(request),
            with_stop=bool(call.include_stop_str_in_output),
            ident=ident,
            model=call.model or self.card.name,
            created=int(time.time()),
            arrived=arrived,
        )
        return Exchange(order, self.frontend, self.text, self.metrics)

    async def body(self, request: Request) -> bytes:
        """A request's body, within the limits."""
        return await read_body(request, self.settings.max_body_bytes, self.settings.body_timeout_s)

    async def _encode_chat(self, call: openai.Call) -> list[int]:
        assert call.messages is not None
        size = sum(len(str(message.get("content"))) for message in call.messages)
        self._check_size(size, "messages")
        return await aside(size, partial(encode_chat, call, shown(call), self.text))

    async def _encode_prompts(self, call: openai.Call) -> list[list[int]]:
        found = []
        for prompt in openai.prompts(call, self.settings.max_prompts):
            if isinstance(prompt, str):
                self._check_size(len(prompt), "prompt")
                special = call.add_special_tokens is not False
                found.append(await aside(len(prompt), partial(self.text.encode, prompt, special)))
            else:
                found.append(prompt)
        return found

    def _check_size(self, num_chars: int, param: str) -> None:
        check_size(num_chars, self.text, self.card, param)

    def _echoed(self, call: openai.Call, prompts: list[list[int]]) -> Iterator[str]:
        """The prompts' texts, where they are wanted: as they were given, or of the token ids."""
        if call.echo:
            for given, tokens in zip(openai.prompts(call, self.settings.max_prompts), prompts, strict=True):
                yield given if isinstance(given, str) else self.text.decode(tokens)

    def _sampling(self, call: openai.Call, chat: bool) -> Sampling:
        calls = grammar_of_calls(call, self.calls, self.text) if chat else ""
        return replace(openai.sampling(call, self.card.stop_ids), grammar=grammar_of(call, self.card, calls))

    def _jobs(self, call: openai.Call, tokens: list[int], sampling: Sampling, chat: bool) -> list[Job]:
        """The jobs of one prompt, with a seed each."""
        openai.check_prompt(tokens, self.card)
        root, hashes = prompt_hashes(tokens, self.card, call.cache_salt or "")
        job = Job(
            tokens=tokens,
            max_new=max(1, openai.max_new(call, len(tokens), self.card, chat)),
            sampling=sampling,
            priority=call.priority or 0,
            root=root,
            # Without hashes no prefix is found, so that every token of the prompt is computed, and has a probability.
            hashes=() if sampling.prompt_logprobs >= 0 else hashes,
        )
        seeds = ((sampling.seed + i) % 2**63 for i in range(openai.num_answers(call)))
        return [replace(job, sampling=replace(sampling, seed=seed)) for seed in seeds]

    # --- the tokenizer ---

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`."""
        return await self._on_text(request, tokenize)

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`."""
        return await self._on_text(request, detokenize)

    async def _on_text(self, request: Request, work: Callable[[bytes, Text, ModelCard], Any]) -> Response:
        body = await self.body(request)
        return _json(await aside(len(body), partial(work, body, self.text, self.card)))

    # --- looking in ---

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        names = (self.card.name, *self.card.aliases)
        return _json({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{name}`."""
        name = request.path_params["name"]
        openai.check_model(name, self.card)
        return _json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        card = self.card
        known = {"id": name, "object": "model", "created": card.created, "owned_by": "diptych"}
        return {**known, "root": card.name, "max_model_len": card.max_tokens}

    async def health(self, request: Request) -> Response:
        """`GET /health`: 200 where those who were asked answer, some of them at least, else 503."""
        try:
            well, details = await self._ask(self.frontend.health())
        except DiptychError as error:
            well, details = False, {"why": str(error)}
        status = "unhealthy" if not well else "degraded" if details.get("silent") or details.get("paths") == 0 else "ok"
        return _json({"status": status, **details}, 200 if well else 503)

    async def workers(self, request: Request) -> Response:
        """`GET /workers`."""
        return _json({"workers": await self._ask(self.frontend.workers())})

    async def requests(self, request: Request) -> Response:
        """`GET /requests`: what became of the last ones, newest first."""
        limit = request.query_params.get("limit", "20")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 9 and 1 <= int(limit) <= MAX_SHOWN):
            raise BadRequest(f"'limit' is a number from 1 to {MAX_SHOWN}", "limit")
        return _json({"requests": await self._ask(self.frontend.records(limit=int(limit)))})

    async def one_request(self, request: Request) -> Response:
        """`GET /requests/{id}`: 404 for one that nobody knows (any more)."""
        ident = request.path_params["id"]
        found = await self._ask(self.frontend.records(ident)) if ident else []
        if not found:
            raise NotFound(f"no request is known as '{ident}'; the last {NUM_KEPT} are", "id", "request_not_found")
        return _json({"id": ident, "requests": found})

    async def drain(self, request: Request) -> Response:
        """`POST /workers/{id}/drain`: 202; 404 for a worker nobody knows, 409 for one that is needed."""
        check_origin(request, self.settings.cors_origins)
        call = openai.decoded(_DRAIN, await self.body(request) or b"{}")
        made = self.frontend.drain(request.path_params["id"], call.timeout_s, call.force)
        return _json(await self._ask(made), 202)

    async def expose_metrics(self, request: Request) -> Response:
        """`GET /metrics`; without the workers' numbers where the router does not answer."""
        rows: list[dict[str, Any]] = []
        routers = ""
        with contextlib.suppress(DiptychError):
            rows, routers = await self._ask(self.frontend.metrics())
        return Response(self.metrics.expose(rows, routers), headers={"content-type": CONTENT_TYPE})

    async def version(self, request: Request) -> Response:
        """`GET /version`."""
        return _json({"version": __version__})

    async def openapi(self, request: Request) -> Response:
        """`GET /openapi.json`."""
        return Response(document(), media_type="application/json")

    async def page(self, request: Request) -> Response:
        """`GET /`."""
        return HTMLResponse(_page(self.card.name, str(request.base_url)))

    async def _ask(self, question: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(question, self.settings.control_timeout_s)
        except TimeoutError as error:
            raise Unavailable("the router does not answer") from error


def make_app(frontend: Frontend, text: Text, card: ModelCard, settings: Settings | None = None) -> Starlette:
    """The ASGI application."""
    settings = settings or Settings()
    card = replace(card, created=card.created or int(time.time()))
    api = Api(frontend, text, card, settings, Metrics(card.name), format_of(text, settings.tool_parser))
    routes = [
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
        *Retrieval(frontend, text, card, api.metrics, api.body).routes(),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/health", api.health),
        Route("/workers", api.workers),
        Route("/workers/{id}/drain", api.drain, methods=["POST"]),
        Route("/requests", api.requests),
        Route("/requests/{id:path}", api.one_request),
        Route("/metrics", api.expose_metrics),
        Route("/version", api.version),
        Route("/openapi.json", api.openapi),
        Route("/", api.page),
    ]
    answer = partial(_answer_error, api.settings.retry_after_s)
    handlers: dict[Any, Any] = {DiptychError: answer, HTTPException: _answer_http, ClientDisconnect: _answer_nobody}
    around = [Middleware(Outermost)]
    if settings.cors_origins:  # before the key is asked for: a browser's first question carries none
        around.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id"],
            )
        )
    if api.settings.api_key is not None:
        around.append(Middleware(Guard, key=api.settings.api_key))
    app = Starlette(routes=routes, middleware=around, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a redirect has no envelope, and clients drop the body on the way
    # Starlette's own last resort stands around ours, has nothing to do there, and would be asked about every token.
    app.middleware_stack = cast(ServerErrorMiddleware, app.build_middleware_stack()).app
    return app


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _answer_error(retry_after_s: int, request: Request, error: DiptychError) -> Response:
    later = isinstance(error, Overloaded | Unavailable)
    headers = {"retry-after": str(retry_after_s)} if later else None
    return Response(openai.error_body(error), error.status, headers, "application/json")


async def _answer_http(request: Request, error: HTTPException) -> Response:
    """What Starlette itself refuses: unknown routes and methods."""
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    message = f"{request.method} {request.url.path}: {error.detail}"
    return Response(openai.envelope(message, kind), error.status_code, error.headers, "application/json")


async def _answer_nobody(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)


def _page(model: str, base: str) -> str:
    links = ("v1/models", "workers", "requests", "health", "metrics", "version", "openapi.json")
    items = "".join(f'<li><a href="/{link}">/{link}</a></li>' for link in links)
    body = msgspec.json.encode({"model": model, "messages": [{"role": "user", "content": "Hello"}]}).decode()
    curl = f"curl {base}v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Diptych</title><h1>Diptych {__version__}</h1>"
        f"<p>Serving <b>{escape(model)}</b>: POST /v1/chat/completions, POST /v1/completions</p><ul>{items}</ul>"
        f"<pre>{escape(curl)}</pre></html>"
    )
