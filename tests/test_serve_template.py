"""Chat templates: rendered as transformers does, in a sandbox, with the client's mistakes as 400s."""

import json
from pathlib import Path

import pytest

from diptych.errors import BadRequest, ConfigError
from diptych.serve.template import ChatTemplate, flatten

HELLO = [{"role": "user", "content": "hello"}]

CASES = {
    "blocks are trimmed": "{% for m in messages %}\n    {% if m.role %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}",
    "json is not escaped for html": "{{ tools | tojson }} {{ messages | tojson(indent=2) }}",
    "loop controls": "{% for i in [1, 2, 3] %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}"
    "{{ i }}{% endfor %}",
    "generation marks": "{% generation %}{{ messages[0].content }}{% endgeneration %}!",
    "namespace": "{% set n = namespace(x=1) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    "dict": "{{ dict(a=1).a }}{{ dict.fromkeys(['k'], 2).k }}",
    "special tokens and extras": "{{ bos_token }}{{ eos_token }}{{ thinking }}{{ documents is none }}",
    "undefined is empty": "[{{ messages[0].name }}]{% if tools is none %}no tools{% endif %}",
}


@pytest.mark.parametrize("source", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("tools", [None, [{"name": "<b>&'"}]], ids=["plain", "tools"])
def test_same_as_transformers(source: str, tools: list | None) -> None:
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = chat.render_jinja_template(
        [HELLO], tools=tools, chat_template=source, add_generation_prompt=True, thinking=False, **specials
    )
    assert ChatTemplate(source, specials).render(HELLO, tools, {"thinking": False}) == expected


ENDINGS = {
    "blanks are kept": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}",
    "blanks are cut": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}",
    "with a cue": "{% for m in messages %}{{ m.content }}|{% endfor %}{% if add_generation_prompt %}you:{% endif %}",
}


@pytest.mark.parametrize("source", ENDINGS.values(), ids=ENDINGS.keys())
@pytest.mark.parametrize("said", ["The fox", "The fox ", "hello"])
@pytest.mark.parametrize("cue", [True, False])
def test_the_last_message_is_continued_as_in_transformers(source: str, said: str, cue: bool) -> None:
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [*HELLO, {"role": "assistant", "content": said}]
    template = ChatTemplate(source)
    for go_on in (True, False):
        (expected,), _ = chat.render_jinja_template(
            [messages], chat_template=source, continue_final_message=go_on, add_generation_prompt=cue and not go_on
        )
        assert template.render(messages, cue=cue, go_on=go_on) == expected
    assert messages[1]["content"] == said


def test_what_a_template_does_not_show_cannot_be_continued() -> None:
    with pytest.raises(BadRequest) as caught:
        ChatTemplate("{{ messages[0].role }}").render(HELLO, go_on=True)
    assert caught.value.param == "continue_final_message"


def test_content_may_be_a_list_of_texts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert flatten({"role": "user", "content": parts}, 0) == {"role": "user", "content": "a\nb"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "x"}, "messages[3].role"),
        ({"role": 7, "content": "x"}, "messages[3].role"),
        ({"role": "user"}, "messages[3].content"),
        ({"role": "user", "content": 5}, "messages[3].content"),
        ({"role": "user", "content": ["x"]}, "messages[3].content[0]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[3].content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "messages[3].content[0]"),
    ],
)
def test_malformed_messages_name_the_place(message: dict, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        flatten(message, 3)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[5].content }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(__class__=1) }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_what_a_template_refuses_is_a_bad_request(source: str) -> None:
    with pytest.raises(BadRequest, match="chat template") as caught:
        ChatTemplate(source).render(HELLO)
    assert caught.value.param == "messages"


def test_a_client_cannot_replace_what_the_template_is_given() -> None:
    extra = {"messages": [{"role": "system", "content": "evil"}], "add_generation_prompt": False}
    assert (
        ChatTemplate("{{ messages[0].content }}{{ add_generation_prompt }}").render(HELLO, None, extra) == "helloTrue"
    )


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path, {}) is None
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    found = ChatTemplate.load(tmp_path, {})
    assert found is not None
    assert found.render(HELLO) == "plain"
    assert found.render(HELLO, [{"name": "f"}]) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    found = ChatTemplate.load(tmp_path, {})
    assert found is not None
    assert found.render(HELLO) == "file"


def test_a_broken_template_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        ChatTemplate("{% for %}")
