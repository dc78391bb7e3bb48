"""Tool calls as a request asks for them: checks, what the model is told, and the grammar that makes an answer a call.

Speaks OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`. Not responsible for finding calls in what a model
writes (`calls.py`), for grammars as such (`structured.py`) or for showing tools to the model (`template.py`).
"""

import re
from typing import Any

import msgspec

from diptych.errors import BadRequest
from diptych.serve.calls import FORMATS, Format
from diptych.serve.openai import Call
from diptych.serve.text import Text

MAX_TOOLS = 128

_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_OTHERS = ("<function=", "<arg_key>", "[TOOL_CALLS]", "<｜tool▁calls▁begin｜>", "<|tool_call>", "to=functions")


def format_of(text: Text, wish: str | None = None) -> Format | None:
    """How a model writes calls: as was said, or as its chat template shows; None where calls are left in the text.

    A template that says nothing leaves Hermes' tags, which nobody writes by chance.
    """
    if wish is not None:
        return FORMATS.get(wish)
    source = text.chat.source if text.chat is not None else ""
    if any(other in source for other in _OTHERS):
        return None  # a format of its own
    llama3 = "<tool_call>" not in source and ("<|python_tag|>" in source or '"parameters": ' in source)
    return FORMATS["llama3" if llama3 else "hermes"]


def check_tools(call: Call) -> None:
    """Refuse tools that are not OpenAI's functions, and a choice that is not among them."""
    if len(call.tools or ()) > MAX_TOOLS:
        raise BadRequest(f"at most {MAX_TOOLS} tools in one request", "tools")
    for at, tool in enumerate(call.tools or ()):
        match tool:
            case {"type": "function", "function": {"name": str(name), **rest}} if _NAME.fullmatch(name):
                if not isinstance(rest.get("parameters") or {}, dict):
                    raise BadRequest(f"tools[{at}].function.parameters must be a JSON schema", f"tools[{at}]")
            case _:
                what = "a function with a name of letters, digits, '_', '-' and '.'"
                raise BadRequest(f"tools[{at}] must be {what}", f"tools[{at}]")
    _forced(call)


def _forced(call: Call) -> list[dict[str, Any]]:
    """The functions of which one must be called; raises `BadRequest`."""
    functions = [tool["function"] for tool in call.tools or ()]
    match call.tool_choice:
        case None | "none" | "auto":
            return []
        case "required":
            chosen = functions
        case {"type": "function", "function": {"name": str(name)}}:
            chosen = [function for function in functions if function["name"] == name]
        case _:
            chosen = []
    if not chosen:
        raise BadRequest("'tool_choice' is none, auto, required or a function, and among 'tools'", "tool_choice")
    return chosen


def shown(call: Call) -> list[dict[str, Any]] | None:
    """The tools a model is told of: none where it is not to call any."""
    return None if call.tool_choice == "none" else call.tools


def grammar_of_calls(call: Call, form: Format | None, text: Text) -> str:
    """The grammar (Lark) of an answer that must be a call; "" where it need not be. Raises `BadRequest`."""
    functions = _forced(call)
    if not functions:
        return ""
    if form is None:
        why = "this server does not know how its model writes calls (--tool-parser)"
        raise BadRequest(f"'tool_choice' is not supported here: {why}", "tool_choice", "unsupported_parameter")
    schemas = [(function["name"], _schema(function)) for function in functions]
    many = call.tool_choice == "required" and call.parallel_tool_calls is not False
    return form.grammar(schemas, many, [marker for marker in form.markers if text.id_of(marker) in text.special_ids])


def _schema(function: dict[str, Any]) -> str:
    """The JSON schema of a function's arguments. Where it names some, or none at all, there are no others."""
    schema = {"type": "object", "properties": {}} | (function.get("parameters") or {})
    if "properties" in (function.get("parameters") or schema):
        schema.setdefault("additionalProperties", False)
    # Blanks bounded as in other structured output: a model that likes them would write them to its last token.
    return msgspec.json.encode(schema | {"x-guidance": {"whitespace_pattern": r"[ \n]{0,20}"}}).decode()
