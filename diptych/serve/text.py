"""Text to token ids and back: tokenizer, incremental detokenizer, block hashes of a prompt. No torch, no transformers.

Reads a checkpoint's `tokenizer.json` with the `tokenizers` library, and its small JSON files for the names of special
tokens. Not responsible for chat templates (`template.py`), stop strings (`answer.py`) or leaving the event
loop during a long encode (`api.py`).
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from diptych.errors import BadRequest, ConfigError
from diptych.policy.hashes import block_hashes, root
from diptych.serve.frontend import ModelCard
from diptych.serve.template import ChatTemplate

Message = dict[str, Any]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Text:
    """A checkpoint's tokenizer and chat template. `stop_ids` are its end-of-sequence tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: ChatTemplate | None = None,
        stop_ids: tuple[int, ...] = (),
    ):
        # A tokenizer.json may carry the truncation and padding of the training run.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.chat = chat
        self.stop_ids = stop_ids
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._shown: dict[int, str] = {}
        self._lengths: dict[int, int] = {}
        self._anchor = next((i for i in tokenizer.encode("a", add_special_tokens=False).ids), 0)
        self.longest_token = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)

    @classmethod
    def load(cls, folder: Path) -> "Text":
        """Read the tokenizer of a checkpoint folder."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{folder} has no tokenizer.json; the API process needs a fast tokenizer")
        tokenizer = Tokenizer.from_file(str(path))
        specials = _special_tokens(folder)
        _mark_special(tokenizer, specials)
        return cls(tokenizer, ChatTemplate.load(folder, specials), _stop_ids(folder, tokenizer, specials))

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a plain text, with the special tokens the tokenizer puts around it."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special).ids
        return ids

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Token ids of two texts as the tokenizer joins them, with the special tokens it puts around and between."""
        ids: list[int] = self.tokenizer.encode(first, second).ids
        return ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: list[Message] | None = None,
        extra: dict[str, Any] | None = None,
        special: bool = False,
        **ending: bool,
    ) -> list[int]:
        """Token ids of a conversation, up to and including the cue for the assistant's turn.

        special: with the tokens that the tokenizer puts around a text; templates write their own. `ending`: how it ends
        otherwise, as `ChatTemplate.render` has it.
        """
        if self.chat is None:
            raise BadRequest("this model has no chat template; use /v1/completions", "messages")
        return self.encode(self.chat.render(messages, tools, extra, **ending), add_special=special)

    def id_of(self, token: str) -> int | None:
        """The id of a token by name, if it is one."""
        found: int | None = self.tokenizer.token_to_id(token)
        return found

    def token(self, token: int) -> str:
        """One token as the text it adds after others, special ones by name; U+FFFD for parts of characters."""
        known = self._shown.get(token)
        if known is None:
            known = self._shown[token] = self._show(token)
        return known

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token adds, also where they are part of a character."""
        shown = self.token(token)
        return _raw_bytes(self.tokenizer.id_to_token(token) or "") if "\ufffd" in shown else shown.encode()

    def _show(self, token: int) -> str:
        # After another token, because some decoders treat the first token of a text differently (a leading space).
        alone: str = self.tokenizer.decode([self._anchor], skip_special_tokens=False)
        after: str = self.tokenizer.decode([self._anchor, token], skip_special_tokens=False)
        if after.startswith(alone):
            return after[len(alone) :]
        shown: str = self.tokenizer.decode([token], skip_special_tokens=False)
        return shown

    def length(self, token: int) -> int:
        """Characters of a token that has the text to itself."""
        known = self._lengths.get(token)
        if known is None:
            known = self._lengths[token] = len(self.tokenizer.decode([token], skip_special_tokens=False))
        return known

    def decode(self, ids: Sequence[int]) -> str:
        """The whole text of an answer, special tokens left out."""
        text: str = self.tokenizer.decode([i for i in ids if i not in self.special_ids], skip_special_tokens=False)
        return text


def _raw_bytes(name: str) -> bytes:
    """The bytes behind a token's name: `<0xE4>` of byte fallback, or byte-level BPE's alphabet."""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name):
        return bytes.fromhex(name[3:5])
    table = _byte_alphabet()
    return bytes(table[char] for char in name) if all(char in table for char in name) else name.encode()


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (Radford et al., 2019): printable Latin-1 is itself, others follow 256."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


# A character is at most four bytes, so at most this much of a decoded tail can still change into something else.
_UNSURE = 4
_LONG_WINDOW = 64


class Detokenizer:
    """Turns token ids into text as they come; never shows half a character. O(1) per token.

    Keeps a short window of tokens and how many characters of its text were given out. The window begins where a
    character did, one step or more before the newest token, because some decoders treat the first token of a text
    differently (a leading space). Special tokens are no text, except those `shown`, by name.
    """

    __slots__ = ("_ids", "_mark", "_sent", "_special", "_text", "_tokenizer")

    def __init__(self, text: Text, shown: Iterable[str] = ()):
        self._text = text
        self._tokenizer = text.tokenizer
        self._special = text.special_ids.difference(map(text.id_of, shown))
        self._ids: list[int] = []
        self._mark = 0  # where the next window may begin: a character ended before it
        self._sent = 0  # characters of the window's text already given out

    def push(self, ids: Sequence[int]) -> str:
        """The text these tokens add, as far as it is certain."""
        window = self._ids
        for token in ids:
            if token not in self._special:
                window.append(token)
        text: str = self._tokenizer.decode(window, skip_special_tokens=False)
        if not text.endswith("\ufffd"):
            new = text[self._sent :]
            self._sent = len(text)
            mark, self._mark = self._mark, len(window)
            if 0 < mark < len(window):
                self._cut(mark, 0)
            return new
        unsure = min(_UNSURE, len(text) - len(text.rstrip("\ufffd")))
        new = text[self._sent : len(text) - unsure]
        self._sent += len(new)
        if len(window) > _LONG_WINDOW:  # bytes that will never be text: do not let the window grow without end
            self._cut(len(window) - _LONG_WINDOW // 2, unsure)
        return new

    def flush(self) -> str:
        """What was held back, at the end: as the tokenizer shows an unfinished character."""
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        new = text[self._sent :]
        self._sent = len(text)
        return new

    def _cut(self, start: int, unsure: int) -> None:
        rest = self._ids[start:]
        if len(rest) == 1:  # as always, where each token ends a character
            length = self._text.length(rest[0])
        else:
            length = len(self._tokenizer.decode(rest, skip_special_tokens=False))
        if length > unsure:  # an empty beginning would make the next token look like the first of the text
            self._ids = rest
            self._sent = length - unsure
            self._mark = max(0, self._mark - start)


_root = lru_cache(maxsize=1024)(root)


def prompt_hashes(tokens: Sequence[int], card: ModelCard, tenant: str = "") -> tuple[bytes, tuple[bytes, ...]]:
    """The hashes under which KV blocks of this prompt are shared; never across models, layouts or tenants.

    Returns the hash before the first block, and those of the full blocks.
    """
    root = _root(card.fingerprint, card.layout, tenant)
    return root, block_hashes(tokens, card.block_size, root)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        return found
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _special_tokens(folder: Path) -> dict[str, str]:
    """The named special tokens, `{"eos_token": "</s>", …}`; each file may write one as a string or an object."""
    named = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    found = {}
    for name in _SPECIAL_NAMES:
        value = named.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found


def _mark_special(tokenizer: Tokenizer, specials: dict[str, str]) -> None:
    """As transformers does: a named special token is one, also where tokenizer.json has it as an ordinary word."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens(
        [word for word in specials.values() if word not in known and tokenizer.token_to_id(word) is not None]
    )


def _stop_ids(folder: Path, tokenizer: Tokenizer, specials: dict[str, str]) -> tuple[int, ...]:
    """End-of-sequence ids as `generate()` takes them; the tokenizer's own where the checkpoint names none."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value:
            return tuple(value)
    token = tokenizer.token_to_id(specials["eos_token"]) if "eos_token" in specials else None
    return () if token is None else (token,)
