"""Chat templates: a checkpoint's Jinja template, rendered in a sandbox as transformers renders it.

The environment repeats the one in transformers' `utils/chat_template_utils.py` (5.23), because a prompt that
differs by a blank from what the model was trained on is a wrong answer. Not responsible for tokens (`text.py`).
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from diptych.errors import BadRequest, ConfigError


class ChatTemplate:
    """Turns a list of messages into the text the model was trained to continue. `source`: that with tools."""

    def __init__(self, source: str, specials: Mapping[str, str] | None = None, tool_source: str | None = None):
        self.source = tool_source or source
        self._specials = dict(specials or {})
        self._template = _compile(source)
        self._with_tools = _compile(tool_source) if tool_source else self._template

    @classmethod
    def load(cls, folder: Path, specials: Mapping[str, str]) -> "ChatTemplate | None":
        """The template of a checkpoint folder: `chat_template.jinja`, or the entry in `tokenizer_config.json`."""
        path = folder / "chat_template.jinja"
        if path.is_file():
            return cls(path.read_text(encoding="utf-8"), specials)
        path = folder / "tokenizer_config.json"
        found = msgspec.json.decode(path.read_bytes()).get("chat_template") if path.is_file() else None
        if isinstance(found, list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in found}
            found = named.get("default")
            return cls(found, specials, named.get("tool_use")) if found else None
        return cls(found, specials) if found else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
        cue: bool = True,
        go_on: bool = False,
    ) -> str:
        """The prompt text. `extra` are further variables of the template (`chat_template_kwargs`).

        cue: what the model's turn begins with comes last. go_on: the text ends within the last message, for the model
        to go on with it, as transformers has it.
        """
        template = self._with_tools if tools else self._template
        said = [flatten(message, at) for at, message in enumerate(messages)]
        known = {
            "messages": said,
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": cue and not go_on,
        }
        if go_on:
            said[-1]["content"] += _HERE
        try:
            text = template.render({**self._specials, **(extra or {}), **known})
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # The template is trusted to suit its model, so what it chokes on is what the client sent.
            raise BadRequest(f"the model's chat template refuses these messages: {error}", "messages") from error
        return _up_to_here(text) if go_on else text


_HERE = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own: the blank shows whether a template keeps blanks at the end


def _up_to_here(text: str) -> str:
    before, tag, after = text.rpartition(_HERE.strip())
    if not tag:
        what = "the model's chat template does not show the last message, so it cannot be continued"
        raise BadRequest(what, "continue_final_message")
    return before if after.startswith(" ") else before.rstrip()


def flatten(message: Mapping[str, Any], at: int) -> dict[str, Any]:
    """A message with its content as one string and its calls' arguments as objects, which is what templates expect.

    Parts other than text are refused.
    """
    role, content = message.get("role"), message.get("content")
    where = f"messages[{at}]"
    if not isinstance(role, str) or not role:
        raise BadRequest(f"{where}.role must be a non-empty string", f"{where}.role")
    if content is None and role == "assistant":  # an assistant turn that only calls tools
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise BadRequest(f"{where}.content must be a string or a list of text parts", f"{where}.content")
    calls = message.get("tool_calls")
    known = {**message, "content": content}
    return known | {"tool_calls": _calls(calls, f"{where}.tool_calls")} if calls else known


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The calls of an assistant's message; OpenAI has the arguments as JSON in a string."""
    found = []
    for at, call in enumerate(calls if isinstance(calls, list) else [calls]):
        match call:
            case {"function": {"name": str(), "arguments": str(text)} as function}:
                found.append({**call, "function": {**function, "arguments": _object(text, f"{where}[{at}]")}})
            case {"function": {"name": str(), "arguments": dict()}}:
                found.append(call)
            case _:
                raise BadRequest(f"{where}[{at}] must have a function with a name and arguments", where)
    return found


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise BadRequest(f"{where}.function.arguments must be a JSON object: {error}", where) from error


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise BadRequest(f"{where}: only parts of type 'text' are supported, not {kind!r}", where)
    text = part.get("text")
    if not isinstance(text, str):
        raise BadRequest(f"{where}.text must be a string", where)
    return text


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it only renders them."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """Jinja's namespace without dunder names, which lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No named parameter, so that a template may write namespace(self=…).
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        Namespace.__setitem__(self, name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot store {name!r} on a namespace")


class _SafeDict:
    """`dict(…)` and `dict.fromkeys(…)` without the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which models have not been trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _compile(source: str) -> Template:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    env.globals["dict"] = _SafeDict()
    env.globals["namespace"] = _SafeNamespace
    try:
        return env.from_string(source)
    except TemplateError as error:
        raise ConfigError(f"the chat template does not compile: {error}") from error
