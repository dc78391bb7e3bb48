"""Log-probabilities in OpenAI's two shapes: of a chat, and of a completion. Not responsible for computing them.

A token is shown as the text it adds in the middle of a text; where that is part of a character, `bytes` says which.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from diptych.engine.executor import Score
from diptych.serve.text import Text

LEAST = -9999.0  # what JSON can say instead of minus infinity, as in OpenAI's and vLLM's replies

Entry = tuple[int, float]
"""A token id and its log-probability."""


def entries(score: Score) -> tuple[Entry, list[Entry]]:
    """The token itself, and the most likely ones."""
    ids: list[int] = np.frombuffer(score.ids, np.int32).tolist()
    values: list[float] = np.frombuffer(score.values, np.float32).astype(np.float64).tolist()
    own, *best = zip(ids, (max(value, LEAST) for value in values), strict=True)
    return own, best


def of_chat(text: Text, scores: Iterable[Score]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""
    content = []
    for score in scores:
        own, best = entries(score)
        content.append(_entry(text, own) | {"top_logprobs": [_entry(text, entry) for entry in best]})
    return {"content": content, "refusal": None}


def _entry(text: Text, entry: Entry) -> dict[str, Any]:
    token, logprob = entry
    return {"token": text.token(token), "logprob": logprob, "bytes": list(text.token_bytes(token))}


class OfCompletion:
    """`choices[].logprobs` of a completion, in as many pieces as wanted: offsets go on where the last one ended."""

    def __init__(self, text: Text):
        self._text = text
        self._offset = 0

    def prompt(self, ids: Sequence[int], scores: Sequence[Score]) -> dict[str, Any]:
        """Of an echoed prompt; its first token has no probability."""
        return together(self._shape(ids[:1], [None], [None]), self.answer(scores))

    def answer(self, scores: Iterable[Score]) -> dict[str, Any]:
        """Of further tokens. The token itself is always among the most likely, as in OpenAI's replies."""
        ids, values, tops = [], [], []
        for score in scores:
            own, best = entries(score)
            ids.append(own[0])
            values.append(own[1])
            top: dict[str, float] = {}
            for token, value in [*best, own]:
                top.setdefault(self._text.token(token), value)  # the likelier of two that look the same
            tops.append(top)
        return self._shape(ids, values, tops)

    def _shape(self, ids: Sequence[int], values: Sequence[float | None], tops: Sequence[Any]) -> dict[str, Any]:
        tokens = [self._text.token(token) for token in ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {"tokens": tokens, "token_logprobs": list(values), "top_logprobs": list(tops), "text_offset": offsets}


def together(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two pieces of a completion's logprobs as one."""
    return {name: first[name] + second[name] for name in first}
