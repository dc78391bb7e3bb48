"""Tokens: whole and incremental decoding agree, checkpoints are read as transformers reads them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_doubles import byte_level_tokenizer, card_of, write_checkpoint
from tokenizers import Tokenizer, decoders, models, normalizers

from diptych.errors import BadRequest, ConfigError
from diptych.serve.text import Detokenizer, Text, prompt_hashes

TEXT = Text(byte_level_tokenizer())


def llama_style() -> Tokenizer:
    """Metaspace words with byte fallback and a leading space that decoding strips, as in Llama 2."""
    vocab = {"<unk>": 0, "▁": 1, "▁a": 2, "b": 3, "▁the": 4, "s": 5}
    vocab |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


LLAMA = Text(llama_style())


def pieces(text: Text, ids: list[int], sizes: list[int]) -> list[str]:
    """Push `ids` in groups of these sizes (repeated as needed), and flush."""
    detokenizer, out, at, turn = Detokenizer(text), [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        out.append(detokenizer.push(ids[at : at + size]))
        at, turn = at + size, turn + 1
    return [*out, detokenizer.flush()]


@given(st.text(min_size=1, max_size=120), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_what_was_encoded_comes_back_however_it_is_cut(said: str, sizes: list[int]) -> None:
    got = pieces(TEXT, TEXT.encode(said), sizes)
    assert "".join(got) == said
    if "\ufffd" not in said:
        assert not any("\ufffd" in piece for piece in got), "half a character was shown"


@given(st.lists(st.integers(0, TEXT.vocab_size - 1), max_size=300), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_any_tokens_at_all_give_the_text_of_decoding_them_at_once(ids: list[int], sizes: list[int]) -> None:
    assert "".join(pieces(TEXT, ids, sizes)) == TEXT.decode(ids)


@given(st.lists(st.sampled_from(["a", " the", "s", "é", "你好", "🦊", " "]), max_size=80))
def test_byte_fallback_and_leading_spaces(words: list[str]) -> None:
    ids = [i for word in words for i in LLAMA.tokenizer.encode(word, add_special_tokens=False).ids]
    got = pieces(LLAMA, ids, [1])
    assert "".join(got) == LLAMA.decode(ids)
    assert not any("\ufffd" in piece for piece in got)


def test_a_character_is_shown_when_its_last_byte_has_come() -> None:
    ids = TEXT.encode("🦊")
    assert len(ids) == 4
    detokenizer = Detokenizer(TEXT)
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "🦊"]


def test_an_unfinished_character_at_the_end_is_shown_as_the_tokenizer_does() -> None:
    ids = TEXT.encode("ok🦊")[:-1]
    assert "".join(pieces(TEXT, ids, [1])) == TEXT.decode(ids) == "ok\ufffd"


def test_special_tokens_are_not_text() -> None:
    (end,) = TEXT.encode("<|end|>")
    assert "".join(pieces(TEXT, [*TEXT.encode("a"), end, *TEXT.encode(" b"), end], [1])) == "a b"


@pytest.mark.parametrize("kind", ["words", "broken bytes"])
def test_the_window_stays_short(kind: str) -> None:
    ids = TEXT.encode("hello world " * 300) if kind == "words" else TEXT.encode("🦊")[-1:] * 3000
    detokenizer = Detokenizer(TEXT)
    longest = 0
    for i in ids:
        detokenizer.push([i])
        longest = max(longest, len(detokenizer._ids))
    assert longest <= 66


def test_a_checkpoint_is_read(tmp_path: Path) -> None:
    text = Text.load(write_checkpoint(tmp_path))
    end = text.tokenizer.token_to_id("<|end|>")
    assert text.stop_ids == (end,)
    ids = text.encode_chat([{"role": "user", "content": "hello"}])
    user, assistant = (text.tokenizer.token_to_id(name) for name in ("<|user|>", "<|assistant|>"))
    assert ids == [user, *text.encode("hello"), end, assistant]


def test_stop_ids_are_those_generate_takes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert Text.load(tmp_path).stop_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert Text.load(tmp_path).stop_ids == (7, 9)


def test_training_time_truncation_is_off() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    assert len(Text(tokenizer).encode("the quick brown fox jumps over the lazy dog")) > 8


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Text.load(tmp_path)
    with pytest.raises(BadRequest, match="no chat template"):
        TEXT.encode_chat([{"role": "user", "content": "hello"}])
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        Text.load(tmp_path)


def test_hashes_are_shared_within_a_tenant_only() -> None:
    card = card_of(TEXT)
    tokens = list(range(40))
    assert len(prompt_hashes(tokens, card)[1]) == 2
    assert prompt_hashes(tokens, card)[1][0] == prompt_hashes(tokens[:16], card)[1][0]
    assert set(prompt_hashes(tokens, card, "a")[1]).isdisjoint(prompt_hashes(tokens, card, "b")[1])
    assert prompt_hashes(tokens, card, "a")[0] != prompt_hashes(tokens, card, "b")[0]
