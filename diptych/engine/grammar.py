"""Which tokens a grammar allows next, by llguidance (https://github.com/guidance-ai/llguidance), an optional extra.

What is allowed is a function of the grammar and the tokens written so far: a sequence that arrives by handover, or is
resumed elsewhere, is replayed. Not responsible for what a request may ask for (`serve/structured.py`).
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import ConfigError


def limits() -> Any:
    """What a grammar may cost before its first token: nobody else's step waits for seconds."""
    from llguidance import LLParserLimits

    return LLParserLimits(initial_lexer_fuel=100_000, verbose_errors=False)


class Grammars:
    """Makes matchers for one model's tokens. Reading its tokenizer takes a second for a large vocabulary."""

    def __init__(self, folder: Path, vocab: int, stop_ids: tuple[int, ...]):
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise ConfigError(f"llguidance cannot be imported ({error}); install diptych[structured]") from error
        text = (folder / "tokenizer.json").read_text()
        self._tokenizer: Any = LLTokenizer(text, n_vocab=vocab, eos_token=list(stop_ids) or None)
        self._vocab, self._limits = vocab, limits()

    def matcher(self, grammar: str) -> "Matcher":
        """A matcher at the beginning of an answer."""
        from llguidance import LLMatcher

        return Matcher(LLMatcher(self._tokenizer, grammar, limits=self._limits), self._vocab)


class Matcher:
    """Where one answer stands in its grammar. Remembers what it was told, so that a step costs one token."""

    def __init__(self, matcher: Any, vocab: int):
        self._matcher = matcher
        self._vocab = vocab
        self._seen: list[int] = []

    def allowed(self, written: list[int]) -> NDArray[np.bool_]:
        """bool [vocab]: what may follow these tokens. Where the grammar is at its end, or was left: the end alone."""
        known = len(self._seen)
        if written[:known] != self._seen:
            self._matcher.reset()
            known = 0
        for token in written[known:]:
            if self._matcher.is_stopped():
                break
            self._matcher.consume_token(token)
        self._seen = list(written)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._vocab, bitorder="little").view(np.bool_)
