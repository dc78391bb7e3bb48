"""Fields that nobody here reads: refused where they would change the answer, else passed over and named once."""

import json
import logging
from typing import Any

import pytest

from diptych.errors import BadRequest
from diptych.serve import fields, openai


def completion(**given: Any) -> openai.Call:
    return openai.parse(json.dumps({"prompt": "hi", **given}).encode(), chat=False)


REFUSED: dict[str, Any] = {
    "audio": {"voice": "alloy"},
    "bad_words": ["x"],
    "chat_template": "{{ messages }}",
    "documents": [{"text": "a"}],
    "ebnf": "root",
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "guided_whitespace_pattern": " ",
    "json_schema": "{}",
    "logits_processors": ["x"],
    "lora_path": "x",
    "mm_processor_kwargs": {"a": 1},
    "modalities": ["text", "audio"],
    "prompt_embeds": ["x"],
    "prompt_logprobs": 0,
    "regex": "a",
    "return_tokens_as_token_ids": True,
    "skip_special_tokens": False,
    "stop_regex": "a",
    "structural_tag": {"a": 1},
    "suffix": "x",
    "truncate_prompt_tokens": 5,
    "use_beam_search": True,
    "web_search_options": {},
}


def test_every_unsupported_field_is_refused_by_its_name() -> None:
    assert set(REFUSED) == set(fields.UNSUPPORTED)
    for name, value in REFUSED.items():
        with pytest.raises(BadRequest, match=f"'{name}'") as caught:
            completion(**{name: value})
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


def test_their_neutral_values_are_let_through() -> None:
    for name, neutral in fields.UNSUPPORTED.items():
        for value in (None, *neutral):
            assert completion(**{name: value}) == completion()


def test_no_field_is_both_read_and_passed_over() -> None:
    known = set(openai.Call.__struct_fields__)
    assert not known & (set(fields.UNSUPPORTED) | fields.QUIET)
    assert not set(fields.UNSUPPORTED) & fields.QUIET


def test_unknown_fields_are_named_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "_named", set())
    caplog.set_level(logging.INFO, "diptych.serve.fields")
    for _ in range(3):
        assert completion(user="me", store=True, mood="a secret", **{"bad\nname" + "x" * 99: 1}) == completion()
    assert len(caplog.messages) == 2
    assert "'mood'" in caplog.messages[0]
    assert "\n" not in caplog.messages[1]
    assert "secret" not in caplog.text
    caplog.clear()
    completion(**{f"field{i}": i for i in range(200)})
    assert len(caplog.messages) == fields.MAX_NAMED - 2, "no client fills the log"


@pytest.mark.parametrize("body", [b'{"prompt": "a", "\xa5": 1}', b'{"prompt": "a", "suffix": "\xa5"}'])
def test_what_is_no_text_is_no_json(body: bytes) -> None:
    with pytest.raises(BadRequest, match="JSON"):
        openai.parse(body, chat=False)
