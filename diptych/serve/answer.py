"""One answer in the making: tokens in, text out, and why it ended.

Evaluates stop strings on the text, holding back what may be the beginning of one. Not responsible for where chunks come
from nor for how text is framed (`exchange.py`, `openai.py`).
"""

from collections.abc import Sequence

from diptych.engine.executor import Score
from diptych.errors import Unavailable
from diptych.policy.messages import Reason
from diptych.serve.frontend import Chunk, Job
from diptych.serve.openai import rejection
from diptych.serve.text import Detokenizer, Text


class StopStrings:
    """Cuts a growing text before the stop string that is complete first, however the text is cut into pieces.

    with_stop: behind it.
    """

    __slots__ = ("_held", "_stops", "_with_stop")

    def __init__(self, stops: Sequence[str], with_stop: bool = False):
        self._stops = tuple(stops)
        self._with_stop = with_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """The text that is certainly part of the answer, and the stop string that ended it ("": none did)."""
        text = self._held + text
        hits = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            self._held = ""
            end, at = min(hits)
            return text[: end if self._with_stop else at], text[at:end]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], ""

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0


class Answer:
    """The state of one answer. `finish` is OpenAI's finish reason once there is one.

    `ended` says that the router has spoken its last word on it: before that, leaving it means cancelling it.
    `taken` and `scores` are the tokens that the last chunk added, also those that are no text (yet). A `silent` answer
    shows nothing: its prompt was all that was asked for. `shown`: special tokens that are text all the same. with_stop:
    what ended the text is part of it. `stop_reason`, as vLLM has it: the stop string or id that was asked for and hit.
    """

    __slots__ = (
        "_detokenizer", "_ends", "_held_to", "_min_new", "_silent", "_stop_ids", "_stops", "_with_stop",
        "cached", "ended", "finish", "num_tokens", "prompt_scores", "scores", "stop_reason", "taken",
    )  # fmt: skip

    def __init__(
        self,
        text: Text,
        job: Job,
        stops: Sequence[str] = (),
        silent: bool = False,
        shown: Sequence[str] = (),
        with_stop: bool = False,
    ):
        self._detokenizer = Detokenizer(text, shown)
        self._stops = StopStrings(stops, with_stop) if stops else None
        self._with_stop = with_stop
        self._ends = text.stop_ids
        self.stop_reason: str | int | None = None
        self._stop_ids = job.sampling.stop_ids
        self._min_new = job.sampling.min_new
        self._held_to = bool(job.sampling.grammar)  # which may be at its end before that
        self._silent = silent
        self.taken: list[int] = []
        self.scores: Sequence[Score] = ()
        self.prompt_scores: Sequence[Score] = ()
        self.num_tokens = 0
        self.cached = 0
        self.finish: str | None = None
        self.ended = False

    def feed(self, chunk: Chunk) -> str:
        """Take in a chunk; returns the text it adds. Raises what the router says instead of an answer."""
        if chunk.cached > self.cached:
            self.cached = chunk.cached
        self.prompt_scores = self.prompt_scores or chunk.prompt_scores
        self.taken, self.scores = [], ()
        reason = chunk.reason
        if chunk.error is not None:
            self.ended = True
            raise rejection(*chunk.error)
        if reason is None:
            return self._take(chunk)
        self.ended = True
        if reason is not Reason.STOP and reason is not Reason.LENGTH:
            raise Unavailable(f"the request did not finish: {reason.value}")
        text = self._take(chunk)
        if self.finish is None:
            text += self._filter(self._detokenizer.flush())
            if self.finish is None:
                text += self._stops.flush() if self._stops else ""
                self.finish = reason.value
        return "" if self._silent else text

    def _take(self, chunk: Chunk) -> str:
        if self._silent:
            return ""
        text = ""
        for token in chunk.tokens:  # one by one: what was written after the stop string does not count
            self.num_tokens += 1
            self.taken.append(token)
            if token in self._stop_ids and (self._held_to or self.num_tokens >= self._min_new):
                # It ended the answer on the worker too: written, and not part of the text.
                if token not in self._ends:
                    self.stop_reason = token
                if self._with_stop:
                    text += self._filter(self._detokenizer.push((token,)))
                break
            text += self._filter(self._detokenizer.push((token,)))
            if self.finish is not None:
                break
        self.scores = chunk.scores[: len(self.taken)]
        return text

    def _filter(self, text: str) -> str:
        if self._stops is None or self.num_tokens < self._min_new:
            return text
        text, stopped = self._stops.push(text)
        if stopped:
            self.finish, self.stop_reason = "stop", stopped
        return text
