"""The two shapes of log-probabilities, and what a single token looks like."""

import json

import numpy as np
import pytest
from serve_doubles import byte_level_tokenizer
from tokenizers import Tokenizer, decoders, models

from diptych.engine.executor import Score
from diptych.serve.logprobs import OfCompletion, of_chat
from diptych.serve.text import Text

TEXT = Text(byte_level_tokenizer())


def score(*entries: tuple[int, float]) -> Score:
    ids, values = zip(*entries, strict=True)
    return Score(1, np.array(ids, np.int32).tobytes(), np.array(values, np.float32).tobytes())


def test_chat() -> None:
    a, b = (TEXT.encode(letter)[0] for letter in "ab")
    shown = of_chat(TEXT, [score((a, -0.5), (b, -0.25), (a, -0.5))])
    assert shown["content"] == [
        {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [
                {"token": "b", "logprob": -0.25, "bytes": [98]},
                {"token": "a", "logprob": -0.5, "bytes": [97]},
            ],
        }
    ]


def test_a_completion_goes_on_where_the_last_piece_ended() -> None:
    ids = TEXT.encode("hello world")
    shown = OfCompletion(TEXT)
    first = shown.prompt(ids, [score((i, -1.0)) for i in ids[1:]])
    assert "".join(first["tokens"]) == "hello world"
    assert first["token_logprobs"] == [None, *[-1.0] * (len(ids) - 1)]
    assert first["top_logprobs"][0] is None
    assert first["top_logprobs"][1:] == [{TEXT.token(i): -1.0} for i in ids[1:]], "the token itself is always there"
    assert first["text_offset"] == [len(TEXT.decode(ids[:n])) for n in range(len(ids))]
    assert shown.answer([score((ids[0], -1.0))])["text_offset"] == [len("hello world")]


def test_minus_infinity_can_be_said_in_json() -> None:
    shown = of_chat(TEXT, [score((5, float("-inf")))])
    assert json.loads(json.dumps(shown))["content"][0]["logprob"] == -9999.0


@pytest.mark.parametrize("letters", ["hello wörld", "né 🦊 你好"])
def test_bytes_of_tokens_add_up_to_the_text(letters: str) -> None:
    assert b"".join(map(TEXT.token_bytes, TEXT.encode(letters))).decode() == letters


def test_bytes_of_a_tokenizer_with_byte_fallback() -> None:
    words = {"<unk>": 0, "a": 1, "\u2581a": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    text = Text(tokenizer)
    assert text.token(2) == " a", "the leading space is there, wherever the token stands"
    assert b"".join(text.token_bytes(3 + byte) for byte in "é".encode()) == "é".encode()
