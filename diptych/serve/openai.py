"""The OpenAI dialect: what a request body may say, and the bytes of errors.

Bodies are decoded and range-checked by msgspec in one pass over the bytes; what else they have is for `fields.py`. Not
responsible for replies (`replies.py`), HTTP, tokens or running anything (`api.py`, `exchange.py`).
"""

import random
from collections.abc import Callable, Collection
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from diptych.engine.executor import Sampling
from diptych.errors import BadRequest, DiptychError, NotFound, Overloaded, TooLarge, Unavailable
from diptych.serve import fields
from diptych.serve.chat import check_turn
from diptych.serve.frontend import ModelCard
from diptych.wording import sentence

Prompt = str | list[int]
T = TypeVar("T")

DEFAULT_COMPLETION_TOKENS = 16
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_CHOICES = 128

_Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Rank = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]


class StreamOptions(msgspec.Struct):
    """`stream_options` of a request."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Call(msgspec.Struct, kw_only=True):
    """The body of a completion or chat completion. None is "not given", as in OpenAI's API."""

    model: str | None = None
    prompt: str | list[str | int | list[int]] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] | None = None
    logit_bias: dict[int, Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    allowed_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    priority: _Rank | None = None
    cache_salt: str | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: bool | Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    return_token_ids: bool | None = None
    diptych_trace: bool | None = None


_CALL = msgspec.json.Decoder(Call)
_encode = msgspec.json.encode


def decoded(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """A body as the decoder's type; raises `BadRequest` naming the field."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise BadRequest(*sentence(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the request body is not valid JSON: {error}") from error


def parse(body: bytes, chat: bool) -> Call:
    """Decode and check a body as far as that needs no model; raises `BadRequest` naming the field."""
    call = decoded(_CALL, body)
    needed = "messages" if chat else "prompt"
    if not getattr(call, needed):
        raise BadRequest(f"'{needed}' is required and must not be empty", needed)
    fields.check(body, Call)
    check_turn(call)
    _check_stops(call)
    _check_logprobs(call, chat)
    _check_best_of(call, chat)
    if call.echo and chat:
        raise BadRequest("'echo' is for completions", "echo")
    for name in ("max_tokens", "max_completion_tokens"):
        if getattr(call, name) == 0 and not call.echo:
            raise BadRequest(f"'{name}' is 0; it must be at least 1, or 'echo' true", name)
    if call.stream_options is not None and not call.stream:
        raise BadRequest("'stream_options' needs 'stream': true", "stream_options")
    return call


def _check_stops(call: Call) -> None:
    stops = stop_strings(call)
    if len(stops) > MAX_STOPS or not all(1 <= len(stop) <= 1024 for stop in stops):
        raise BadRequest(f"'stop' takes up to {MAX_STOPS} non-empty strings of at most 1024 characters", "stop")


def _check_logprobs(call: Call, chat: bool) -> None:
    """Chat says `logprobs: true` and how many `top_logprobs`; a completion says the number at once."""
    asked = call.logprobs
    if asked is not None and isinstance(asked, bool) != chat and asked is not False:
        raise BadRequest(f"'logprobs' is {'true or false' if chat else 'a number'} here", "logprobs")
    if call.top_logprobs and not (chat and asked):
        raise BadRequest("'top_logprobs' needs 'logprobs': true, in a chat completion", "top_logprobs")


def _check_best_of(call: Call, chat: bool) -> None:
    """So many answers are written, of which the `n` best are shown; OpenAI's, for completions alone."""
    if call.best_of is None or call.best_of == (call.n or 1):
        return
    if chat or call.stream or call.best_of < (call.n or 1):
        raise BadRequest("'best_of' is at least 'n', for completions, and cannot be streamed", "best_of")


def num_logprobs(call: Call) -> int:
    """How many alternatives to report with each token; -1 where no log-probabilities are asked for."""
    if call.logprobs is None or call.logprobs is False:
        return -1
    return (call.top_logprobs or 0) if call.logprobs is True else call.logprobs


def stop_strings(call: Call) -> tuple[str, ...]:
    """The stop strings, however they were written."""
    return (call.stop,) if isinstance(call.stop, str) else tuple(call.stop or ())


def prompts(call: Call, limit: int) -> list[Prompt]:
    """The prompts of a completion."""
    assert call.prompt is not None
    return listed(call.prompt, limit, "prompt")


def listed(given: str | list[str | int | list[int]], limit: int, param: str) -> list[Prompt]:
    """One text, one list of ids, or up to `limit` of either, always as a list."""
    if isinstance(given, str):
        return [given]
    kinds = {type(part) for part in given}
    if len(kinds) != 1:
        raise BadRequest(f"'{param}' must not mix texts, token ids and lists of token ids", param)
    if kinds == {int}:
        return [given]  # type: ignore[list-item]
    if len(given) > limit:
        raise BadRequest(f"at most {limit} {param}s in one request", param)
    return given  # type: ignore[return-value]


def check_model(name: str | None, card: ModelCard) -> None:
    """Refuse a request for a model that is not the one served; none named means that one."""
    if name is not None and name != card.name and name not in card.aliases:
        raise NotFound(f"the model '{name}' does not exist; this server has '{card.name}'", "model", "model_not_found")


def check_writes(card: ModelCard) -> None:
    """Refuse to let a checkpoint write that has no head for it."""
    if card.task != "generate":
        able = "embeddings" if card.task == "embed" else "/v1/score, /v1/rerank and /v1/classify"
        raise BadRequest(f"this model cannot write text; it is made for {able}", "model", "unsupported_model")


def check_prompt(tokens: list[int], card: ModelCard, param: str = "prompt") -> None:
    """Refuse an empty prompt and ids outside the vocabulary."""
    if not tokens:
        raise BadRequest("the prompt has no tokens", param)
    if min(tokens) < 0 or max(tokens) >= card.vocab_size:
        raise BadRequest(f"token ids must be from 0 to {card.vocab_size - 1}", param)


def check_ids(call: Call, card: ModelCard) -> None:
    """Refuse ids outside the vocabulary, and an empty list of those that are allowed."""
    if call.allowed_token_ids == []:
        raise BadRequest("'allowed_token_ids' is empty: no token could be written", "allowed_token_ids")
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        ids: Collection[int] | None = getattr(call, name)
        if ids and not 0 <= min(ids) <= max(ids) < card.vocab_size:
            raise BadRequest(f"token ids must be from 0 to {card.vocab_size - 1}", name)


def check_scored(call: Call, card: ModelCard) -> None:
    """Refuse log-probabilities, and answers that are ranked by them, where the workers only pretend to compute."""
    ranked = call.best_of is not None and call.best_of > (call.n or 1)
    if not card.scored and (ranked or num_logprobs(call) >= 0):
        name = "best_of" if ranked else "logprobs"
        what = f"'{name}' is not supported here: the paced engine has no log-probabilities"
        raise BadRequest(what, name, "unsupported_parameter")


def max_new(call: Call, num_prompt: int, card: ModelCard, chat: bool) -> int:
    """How many tokens may be written (0 with `echo` alone); refuses what does not fit into the model's context."""
    room = card.max_tokens - num_prompt
    asked = call.max_tokens if call.max_completion_tokens is None else call.max_completion_tokens
    field = "messages" if chat else "prompt"
    if room < (0 if writes_nothing(call) else 1):
        raise too_long(f"the prompt has {num_prompt} tokens", card, field)
    if asked is None:
        asked = room if chat else min(DEFAULT_COMPLETION_TOKENS, room)
    elif asked > room:
        raise too_long(f"the prompt has {num_prompt} tokens and {asked} more are asked for", card, field)
    if call.min_tokens and call.min_tokens > asked:
        raise BadRequest(f"'min_tokens' is {call.min_tokens}, more than the {asked} to be written", "min_tokens")
    return asked


def num_answers(call: Call) -> int:
    """How many answers to write to each prompt: `n`, or `best_of`, of which `n` are shown."""
    return call.best_of or call.n or 1


def writes_nothing(call: Call) -> bool:
    """The prompt is all that is wanted: `echo` with no token to be written."""
    return bool(call.echo) and (call.max_completion_tokens or call.max_tokens) == 0


def too_long(what: str, card: ModelCard, param: str) -> BadRequest:
    """The error for what does not fit into the context."""
    message = f"this model's context is {card.max_tokens} tokens, prompt and answer together; {what}"
    return BadRequest(message, param, "context_length_exceeded")


def sampling(call: Call, stop_ids: tuple[int, ...]) -> Sampling:
    """The sampling parameters. Without a seed each request gets its own."""
    ends = () if call.ignore_eos else stop_ids
    top = num_logprobs(call)
    ranked = call.best_of is not None  # by log-probability, whether or not it is shown
    return Sampling(
        temperature=1.0 if call.temperature is None else call.temperature,
        top_k=max(0, call.top_k or 0),
        top_p=1.0 if call.top_p is None else call.top_p,
        seed=random.getrandbits(63) if call.seed is None else call.seed % 2**63,
        stop_ids=tuple(dict.fromkeys((*ends, *(call.stop_token_ids or ())))),
        min_new=call.min_tokens or 0,
        min_p=call.min_p or 0.0,
        repetition_penalty=1.0 if call.repetition_penalty is None else call.repetition_penalty,
        presence_penalty=call.presence_penalty or 0.0,
        frequency_penalty=call.frequency_penalty or 0.0,
        logit_bias=tuple(sorted((call.logit_bias or {}).items())),
        allowed_ids=tuple(sorted(set(call.allowed_token_ids or ()))),
        logprobs=max(top, 0) if ranked else top,
        prompt_logprobs=top if call.echo else -1,
    )


# --- errors ----------------------------------------------------------------------------------------------------


def error_body(error: DiptychError) -> bytes:
    """OpenAI's error envelope."""
    return envelope(str(error), error.kind, getattr(error, "param", None), getattr(error, "code", None))


def envelope(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    """OpenAI's error envelope, from its parts."""
    return _encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error_frame(error: DiptychError) -> bytes:
    """An error after the stream began, as an event."""
    return b"data: " + error_body(error) + b"\n\n"


_BY_STATUS: dict[int, Callable[[str], DiptychError]] = {
    400: BadRequest,
    404: NotFound,
    413: TooLarge,
    429: Overloaded,
    503: Unavailable,
}


def rejection(status: int, why: str) -> DiptychError:
    """The error for a router's last word on a request."""
    return _BY_STATUS.get(status, DiptychError)(why)
