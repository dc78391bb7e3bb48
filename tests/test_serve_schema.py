"""The OpenAPI document: it describes what is served, all of it, and what requests are checked with."""

import json
from typing import Any

import httpx
import msgspec
from serve_doubles import byte_level_tokenizer, card_of, serving
from starlette.routing import Route

from diptych.serve.api import make_app
from diptych.serve.openai import Call
from diptych.serve.schema import document
from diptych.serve.text import Text

TEXT = Text(byte_level_tokenizer())


def routes() -> set[tuple[str, str]]:
    """Every path and method of the application, but for the page and HEAD."""
    app = make_app(None, TEXT, card_of(TEXT))  # type: ignore[arg-type]
    return {
        (route.path.replace(":path}", "}"), method.lower())
        for route in app.routes
        if isinstance(route, Route) and route.path != "/"
        for method in (route.methods or set()) - {"HEAD"}
    }


def test_what_is_asked_beside_the_path_is_described() -> None:
    paths: dict[str, Any] = json.loads(document())["paths"]
    (limit,) = paths["/requests"]["get"]["parameters"]
    assert (limit["name"], limit["in"], limit["schema"]["maximum"]) == ("limit", "query", 256)
    (trace,) = paths["/v1/completions"]["post"]["parameters"]
    assert (trace["name"], trace["in"], trace["required"]) == ("X-Diptych-Trace", "header", False)


def test_it_has_every_route_and_no_other() -> None:
    found: dict[str, Any] = json.loads(document())
    assert {(path, method) for path, methods in found["paths"].items() for method in methods} == routes()


def test_it_has_every_field_with_its_limits() -> None:
    found = json.loads(document())
    properties = found["components"]["schemas"]["Call"]["properties"]
    assert set(properties) == {field.encode_name for field in msgspec.structs.fields(Call)}
    assert {"type": "number", "minimum": 0.0, "maximum": 2.0} in properties["temperature"]["anyOf"]


def test_every_reference_leads_somewhere() -> None:
    found = document().decode()
    schemas = json.loads(found)["components"]["schemas"]
    named = {part.split('"')[0] for part in found.split("#/components/schemas/")[1:]}
    assert {"Call", "Tokenized", "Error"} <= named <= set(schemas)


def test_it_is_served() -> None:
    with serving(TEXT) as live:
        got = httpx.get(f"{live.url}/openapi.json")
        assert got.headers["content-type"] == "application/json"
        assert got.json()["openapi"].startswith("3.1")
