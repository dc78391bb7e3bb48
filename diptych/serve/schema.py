"""The OpenAPI document: made from the structs that requests are checked with, so that it cannot say anything else.

Generated replies are OpenAI's and are described as such, the others by their structs. Not responsible for checking.
"""

from functools import lru_cache
from typing import Any

import msgspec

from diptych import __version__
from diptych.serve.frontend import DrainCall
from diptych.serve.openai import Call
from diptych.serve.pooling import (
    Classes,
    ClassifyCall,
    EmbeddingCall,
    Embeddings,
    RerankCall,
    Reranked,
    ScoreCall,
    Scores,
)
from diptych.serve.records import MAX_SHOWN
from diptych.serve.tokenize import DetokenizeCall, Detokenized, TokenizeCall, Tokenized

_BODIES: dict[str, tuple[type, str, type | None]] = {
    "/v1/chat/completions": (Call, "Answer a conversation (`messages`), as OpenAI does; streamed or not", None),
    "/v1/completions": (Call, "Continue a text or token ids (`prompt`), as OpenAI did; streamed or not", None),
    "/v1/embeddings": (EmbeddingCall, "The vector of each text, as OpenAI does", Embeddings),
    "/v1/score": (ScoreCall, "How alike two texts are, or how well one answers the other, as vLLM does", Scores),
    "/score": (ScoreCall, "The same", Scores),
    "/v1/rerank": (RerankCall, "Documents by how well they answer a query, as Jina and Cohere do", Reranked),
    "/rerank": (RerankCall, "The same", Reranked),
    "/v2/rerank": (RerankCall, "The same", Reranked),
    "/v1/classify": (ClassifyCall, "The label of each text, as vLLM does", Classes),
    "/classify": (ClassifyCall, "The same", Classes),
    "/tokenize": (TokenizeCall, "The token ids of a text or a chat", Tokenized),
    "/detokenize": (DetokenizeCall, "The text of token ids", Detokenized),
    "/workers/{id}/drain": (DrainCall, "Take a worker out of service; 409 for the last of its kind", None),
}
_LOOKS = {
    "/v1/models": "The model that is served",
    "/v1/models/{name}": "The same by name",
    "/health": "200 where those who were asked answer, some of them at least, else 503",
    "/workers": "How every worker is",
    "/requests": "Where the time of the last requests went, newest first",
    "/requests/{id}": "The same of one, by the id of its reply or its X-Request-Id",
    "/metrics": "Prometheus",
    "/version": "The version",
    "/openapi.json": "This document",
}
_TRACE = {"name": "X-Diptych-Trace", "in": "header", "required": False, "schema": {"enum": ["0", "1"]}}
_LIMIT = {"type": "integer", "minimum": 1, "maximum": MAX_SHOWN, "default": 20}
_UNTRACED = ("/tokenize", "/detokenize", "/workers/{id}/drain")
_BESIDE: dict[str, dict[str, Any]] = {
    **{path: _TRACE for path in _BODIES if path not in _UNTRACED},
    "/requests": {"name": "limit", "in": "query", "required": False, "schema": _LIMIT},
}
_REF = "#/components/schemas/{name}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@lru_cache(maxsize=1)
def document() -> bytes:
    """The document, as JSON."""
    kinds = {kind for body, _, answer in _BODIES.values() for kind in (body, answer) if kind}
    _, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    paths = {path: {"post": _post(path, *parts)} for path, parts in _BODIES.items()}
    paths |= {path: {"get": _get(path, what)} for path, what in _LOOKS.items()}
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "Diptych", "version": __version__},
            "paths": paths,
            "components": {
                "schemas": components | {"Error": _ERROR},
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{}, {"key": []}],
        }
    )


def _post(path: str, body: type, what: str, answer: type | None) -> dict[str, Any]:
    known = {} if answer is None else {"schema": _reference(answer.__name__)}
    return {
        "summary": what,
        **_parameters(path),
        "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(body.__name__)}}},
        "responses": {"200": {"description": "OK", "content": {"application/json": known}}, **_errors()},
    }


def _get(path: str, what: str) -> dict[str, Any]:
    return {"summary": what, **_parameters(path), "responses": {"200": {"description": "OK"}, **_errors()}}


def _parameters(path: str) -> dict[str, Any]:
    """What is in the path, and beside it."""
    named = [name.partition("}")[0] for name in path.split("{")[1:]]
    found = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in named]
    found += [_BESIDE[path]] if path in _BESIDE else []
    return {"parameters": found} if found else {}


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": _reference("Error")}}
    return {"default": {"description": "OpenAI's error envelope", "content": content}}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(name=name)}
