"""One job on its way through an exchange: when it is submitted, what came of it, and what is shown beside its text.

Not responsible for the exchange as a whole (`exchange.py`) or for text (`answer.py`).
"""

import asyncio
from collections.abc import Awaitable
from time import perf_counter
from typing import Any

from diptych.engine.executor import Score
from diptych.errors import DiptychError, Overloaded, Unavailable
from diptych.serve.answer import Answer
from diptych.serve.calls import CallParser, Piece
from diptych.serve.frontend import Chunk, Frontend, Job, Stream
from diptych.serve.logprobs import OfCompletion, entries, of_chat, together
from diptych.serve.metrics import Timer
from diptych.serve.replies import PLAIN, Detail, usage
from diptych.serve.text import Text
from diptych.serve.wire import Note


class Showing:
    """What a choice says beside its text: log-probabilities and token ids, where asked for."""

    def __init__(self, text: Text, chat: bool, job: Job, with_ids: bool, scored: bool):
        self._text = text
        self._job = job
        self._with_ids = with_ids
        self._scored = scored
        self._completion = None if chat else OfCompletion(text)
        self._plain = not (self._scored or with_ids)

    def step(self, answer: Answer, used: dict[str, Any] | None) -> Detail:
        """Beside what the last chunk added."""
        if self._plain:
            return PLAIN if used is None else Detail(usage=used)
        ids = answer.taken if self._with_ids else None
        return Detail(self._scores(answer.scores), ids, usage=used)

    def prompt(self, answer: Answer, used: dict[str, Any] | None) -> Detail:
        """Beside the prompt, or in its place where it is not echoed."""
        scores = self._prompt_scores(answer)
        return Detail(scores, prompt_ids=self._job.tokens if self._with_ids else None, usage=used)

    def whole(self, answer: Answer, taken: list[int], scores: list[Score]) -> Detail:
        """Beside a whole answer."""
        prompt = self._prompt_scores(answer)
        written = self._scores(scores)
        logprobs = written if prompt is None or written is None else together(prompt, written)
        return Detail(logprobs, taken, self._job.tokens) if self._with_ids else Detail(logprobs)

    def _scores(self, scores: Any) -> dict[str, Any] | None:
        if not self._scored:
            return None
        return of_chat(self._text, scores) if self._completion is None else self._completion.answer(scores)

    def _prompt_scores(self, answer: Answer) -> dict[str, Any] | None:
        if self._completion is None or self._job.sampling.prompt_logprobs < 0:
            return None
        return self._completion.prompt(self._job.tokens, answer.prompt_scores)


class Turn:
    """One job. Where it has a `leader` with the same prompt, it is submitted when the prompt is computed.

    Its KV is then found, wherever the leader's prompt was computed, instead of computed once more. `parser` finds
    calls, where there may be any.
    """

    def __init__(
        self,
        job: Job,
        answer: Answer,
        timer: Timer,
        leader: "Turn | None",
        showing: Showing,
        parser: CallParser | None = None,
    ):
        self.job = job
        self.answer = answer
        self.showing = showing
        self.parser = parser
        self.waits = leader is not None and bool(job.hashes)  # a prompt of less than a block is never found
        self._leader = leader
        self._timer = timer
        self._computed = asyncio.Event()
        self._request = -1
        self._stream: Stream | None = None
        self._failure = "cancelled"
        self._ready = self._submitted = self._heard = perf_counter()
        self._noted = False
        self._taken: list[int] = []
        self._scores: list[Score] = []

    def submit(self, frontend: Frontend) -> None:
        """Hand it in."""
        try:
            self._submitted = perf_counter()
            self._request, self._stream = frontend.submit(self.job)
        except DiptychError:
            self._failure = "rejected"
            raise

    async def begin(self, frontend: Frontend) -> None:
        """Submit it when it is time, unless it was already."""
        if self._stream is None:
            assert self._leader is not None
            await self._leader._computed.wait()  # in bounded time: a leader that fails cancels us
            self.submit(frontend)

    def more(self) -> Awaitable[Chunk]:
        """The next chunk, when it comes."""
        assert self._stream is not None
        return self._stream.get()

    def take(self, chunk: Chunk) -> str:
        """The text of a chunk."""
        before = self.answer.num_tokens
        if not before:
            self._heard = perf_counter()
        try:
            text = self.answer.feed(chunk)
        except DiptychError as error:
            turned_away = isinstance(error, Overloaded | Unavailable) and before == 0
            self._failure = "rejected" if turned_away else "failed"
            raise
        if not before:
            self._computed.set()
        self._timer.tokens(self.answer.num_tokens - before)
        return text

    def keep(self) -> None:
        """Remember what the last chunk added, for `whole`."""
        self._taken += self.answer.taken
        self._scores += self.answer.scores

    def whole(self) -> Detail:
        """What to say beside the whole answer."""
        return self.showing.whole(self.answer, self._taken, self._scores)

    def mean_logprob(self) -> float:
        """Of the tokens that were kept; what is not known counts as certain."""
        return sum(entries(score)[0][1] for score in self._scores) / max(len(self._scores), 1)

    def pieces(self, text: str) -> list[Piece]:
        """What more text adds to content and calls; with the last of an answer also what was held back."""
        if self.parser is None:
            return [Piece(text)]
        found = self.parser.push(text)
        return found if self.answer.finish is None else found + self.parser.flush()

    @property
    def finish(self) -> str:
        """OpenAI's finish reason, once there is one: an answer that stopped after a call stopped for it."""
        called = self.parser is not None and self.parser.num_calls > 0
        return "tool_calls" if called and self.answer.finish == "stop" else self.answer.finish or ""

    def usage(self) -> dict[str, Any]:
        """The usage of this choice so far."""
        return usage(len(self.job.tokens), self.answer.num_tokens, self.answer.cached)

    @property
    def ending(self) -> str:
        """How it went: OpenAI's finish reason, or `cancelled`, `rejected`, `failed`."""
        return self.answer.finish or self._failure

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the request's arrival to the first token, if one came."""
        return self._timer.ttft_s

    def note(self, frontend: Frontend) -> None:
        """Tell the router how it looked from here; once."""
        if self._noted or self._stream is None:
            return
        self._noted = True
        first, waited, out_s = self._timer.ttft_s, 0.0, 0.0
        if first is not None:
            out_s = self._timer.arrived + first - self._heard
        api_s = self._submitted - self._timer.arrived
        if self.waits:
            waited = self._submitted - self._ready
            api_s -= waited
        label = self.job.label
        frontend.note(Note(label.ident, label.index, self.ending, first or 0.0, api_s, waited, out_s))

    def leave(self, frontend: Frontend) -> None:
        """However it went, the router need not go on with this, and the books are closed."""
        self._timer.end(self.ending, self.answer.cached)
        self.note(frontend)
        if self._stream is not None and not self.answer.ended:
            frontend.cancel(self._request)
