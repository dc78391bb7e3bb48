"""Finds tool calls in what a model writes, as it is written: text in, pieces of content and of calls out.

Two formats, both a JSON object a call: Hermes (Qwen, Hermes and others; `<tool_call>{"name": …, "arguments": …}
</tool_call>` anywhere) and Llama 3 (`{"name": …, "parameters": …}` as the whole answer, several separated by `;`,
perhaps after `<|python_tag|>`). What begins like a call and is none is content, unchanged. Not responsible for what a
request may ask (`tools.py`), nor for whether arguments suit their schema: only a grammar can promise that.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_BLANKS = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class Piece:
    """More of an answer: of its content, or, where `call` is not negative, of that call's arguments (JSON).

    The first piece of a call, and no other, has its `name`.
    """

    text: str
    call: int = -1
    name: str = ""


class CallReader:
    """One call, `{"name": …, "arguments": {…}}` in any order of keys, character by character.

    A call has begun, and its arguments are given out as they come, once its name is known and an object of arguments
    begins. `tagged`: a name alone is a call, too. `broken`: this is no call; `raw` is what was read.
    """

    def __init__(self, tagged: bool):
        self._tagged = tagged
        self.raw = ""
        self.begun = self.done = self.broken = False
        self._name: str | None = None
        self._depth = 0
        self._in_string = self._escaped = False
        self._key = ""  # whose value is being read; "" while a key is
        self._start = 0  # where that key or value began
        self._said = -1  # of the arguments, up to here; -1: none are there
        self._end = 0  # where they end, once they do
        self._quoted = ""  # arguments that are JSON in a string, as OpenAI has them

    def push(self, text: str) -> int:
        """Read on; returns how many characters belong to the call (all, or up to its end)."""
        for at, char in enumerate(text):
            self.raw += char
            self._take(char)
            if self.done or self.broken:
                return at + 1
        return len(text)

    def fresh(self) -> list[tuple[str, str]]:
        """What has become known since: (name, "") when it begins, then ("", more arguments)."""
        found = []
        if not self.begun and self._name and (self._said >= 0 or self._quoted or (self.done and self._tagged)):
            self.begun = True
            found.append((self._name, ""))
            if self._said < 0:
                found.append(("", self._quoted or "{}"))
        if self.begun and self._said >= 0:
            end = self._end or len(self.raw)
            if end > self._said:
                found.append(("", self.raw[self._said : end]))
                self._said = end
        self.broken = self.broken or (self.done and not self.begun)
        return found

    def _take(self, char: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
            return
        if not self._depth:
            self._depth, self._start, self.broken = 1, 1, char != "{"
        elif self._depth == 1:
            self._at_top(char)
        elif char in "}]":
            self._depth -= 1
            if self._depth == 1 and self._said >= 0 and not self._end and self._key in _ARGUMENTS:
                self._end = len(self.raw)
        elif char in "{[":
            self._depth += 1
        if char == '"' and self._depth:
            self._in_string = True

    def _at_top(self, char: str) -> None:
        """A character of the call's own object that is in none of its strings and values."""
        if char == ":" and not self._key:
            self._key = self._value(str) or ""
            self.broken = not self._key
            self._start = len(self.raw)
        elif char in ",}":
            self._close(char)
        elif char in "{[":
            self._depth += 1
            if char == "{" and self._key in _ARGUMENTS and self._said < 0:
                self._said = len(self.raw) - 1
        elif not self._key and char not in _BLANKS + '"':
            self.broken = True

    def _close(self, char: str) -> None:
        if self._key == "name":
            self._name = self._value(str) or None
            self.broken = self._name is None
        elif self._key in _ARGUMENTS and self._said < 0:
            self._quoted = self._value(str) or ""
        self._key, self._start = "", len(self.raw)
        self.done = char == "}"

    def _value(self, kind: type) -> Any:
        """The JSON value between `_start` and the character just read; None where it is not of that kind."""
        try:
            value = json.loads(self.raw[self._start : -1])
        except ValueError:
            return None
        return value if isinstance(value, kind) else None


@dataclass(frozen=True, slots=True)
class Format:
    """How a family of models writes calls.

    `find(held, num_calls, spoken)`: up to where a text is certainly content, and where the object of the next call
    begins (-1: nowhere yet). `close` ends a call; `markers` may be special tokens, which are text here all the same.
    """

    name: str
    key: str  # of the arguments
    open: str
    close: str
    markers: tuple[str, ...]
    find: Callable[[str, int, bool], tuple[int, int]]

    def grammar(self, functions: Iterable[tuple[str, str]], many: bool, specials: Sequence[str] = ()) -> str:
        """A grammar (llguidance's Lark) of one call, or of one and more: of functions by name and JSON schema."""
        rules, names = [], []
        for at, (name, schema) in enumerate(functions):
            head = json.dumps(f'{{"name": "{name}", "{self.key}": ')
            names.append(f"f{at}")
            rules.append(f'f{at}: {head} %json {schema} "}}"')
        opening, closing = (_marker(marker, specials) for marker in (self.open, self.close))
        call = f'{opening} "\\n" one "\\n" {closing}' if self.open else "one"
        between = '"\\n"' if self.open else '"; "'
        start = f"call ({between} call)*" if many else "call"
        return "\n".join((f"start: {start}", f"call: {call}", f"one: {' | '.join(names)}", *rules))


def _marker(text: str, specials: Sequence[str]) -> str:
    return text if text in specials else json.dumps(text)


def _find_hermes(held: str, num_calls: int, spoken: bool) -> tuple[int, int]:
    at = held.find("<tool_call>")
    if at >= 0:
        start = at + len("<tool_call>")
        return len(held[:at].rstrip(_BLANKS)), _skip(held, start) if held[start:].strip(_BLANKS) else -1
    keep = next((n for n in range(min(len(held), 10), 0, -1) if "<tool_call>".startswith(held[-n:])), 0)
    return len(held[: len(held) - keep].rstrip(_BLANKS)), -1


def _find_llama3(held: str, num_calls: int, spoken: bool) -> tuple[int, int]:
    if spoken:
        return len(held), -1
    at = _skip(held, 0)
    lead = ";" if num_calls else "<|python_tag|>"
    if held.startswith(lead, at):
        at = _skip(held, at + len(lead))
    elif lead.startswith(held[at:]):
        return 0, -1  # not all of it is here yet
    if at == len(held):
        return 0, -1
    return (0, at) if held[at] == "{" else (len(held), -1)


def _skip(text: str, at: int) -> int:
    """The next place that is not blank."""
    return len(text) - len(text[at:].lstrip(_BLANKS))


FORMATS: dict[str, Format] = {
    "hermes": Format(
        "hermes", "arguments", "<tool_call>", "</tool_call>", ("<tool_call>", "</tool_call>"), _find_hermes
    ),
    "llama3": Format("llama3", "parameters", "", "", ("<|python_tag|>",), _find_llama3),
}


class CallParser:
    """Takes an answer apart into content and calls, wherever its text is cut. `num_calls` have begun so far."""

    def __init__(self, form: Format):
        self._form = form
        self._held = ""  # what may yet become the beginning, or the end, of a call
        self._opened = ""  # what led to the call being read
        self._reader: CallReader | None = None
        self._spoken = False
        self.num_calls = 0

    def push(self, text: str) -> list[Piece]:
        """What is certain now."""
        self._held += text
        found: list[Piece] = []
        while self._step(found):
            pass
        return found

    def flush(self) -> list[Piece]:
        """What was held back, once no more text can come."""
        reader, held = self._reader, self._held
        self._held = ""
        if reader is not None:
            return [] if reader.begun else [Piece(self._opened + reader.raw)]
        return [Piece(held)] if held and (held.strip(_BLANKS) or not self.num_calls) else []

    def _step(self, found: list[Piece]) -> bool:
        """Get a part further; False where that needs more text."""
        if self._reader is None:
            return self._look(found)
        if not self._reader.done:
            return self._read(self._reader, found)
        return self._leave()

    def _look(self, found: list[Piece]) -> bool:
        end, start = self._form.find(self._held, self.num_calls, self._spoken)
        if end:
            self._spoken = True
            found.append(Piece(self._held[:end]))
        if start >= 0:
            self._opened, self._reader = self._held[end:start], CallReader(bool(self._form.open))
        self._held = self._held[max(end, start) :]
        return start >= 0

    def _read(self, reader: CallReader, found: list[Piece]) -> bool:
        self._held = self._held[reader.push(self._held) :]
        for name, arguments in reader.fresh():
            self.num_calls += bool(name)
            found.append(Piece(arguments, self.num_calls - 1, name))
        if reader.broken:
            self._spoken, self._reader = True, None
            found.append(Piece(self._opened + reader.raw))
            return True
        return reader.done

    def _leave(self) -> bool:
        """Past the end of a call; one that was forgotten is not waited for."""
        close, rest = self._form.close, self._held.lstrip(_BLANKS)
        if close and not rest.startswith(close) and close.startswith(rest):
            return False
        if close and rest.startswith(close):
            self._held = rest[len(close) :]
        self._reader = None
        return bool(self._held)
