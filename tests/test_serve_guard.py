"""The key: who gets in, who does not, and what needs none."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serve_doubles import FakeFrontend, Live, byte_level_tokenizer, serving

from diptych.config import load_cluster
from diptych.errors import ConfigError
from diptych.serve.api import Settings
from diptych.serve.guard import Guard
from diptych.serve.text import Text

KEY = "sésame"
CLOSED = ["/", "/v1/models", "/workers", "/version", "/openapi.json", "/nothing", "/health/", "//health", "/HEALTH"]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(Text(byte_level_tokenizer()), FakeFrontend(), Settings(api_key=KEY)) as made:
        yield made


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", f"Bearer {KEY}!", f"Bearer {KEY.upper()}", KEY])
def test_without_the_key(live: Live, path: str, given: str | None) -> None:
    headers = [] if given is None else [(b"authorization", given.encode())]
    got = httpx.get(live.url + path, headers=headers)
    assert got.status_code == 401
    assert got.json()["error"]["code"] == "invalid_api_key"
    assert got.headers["www-authenticate"] == "Bearer"
    assert got.headers["x-request-id"]
    assert KEY not in got.text


def test_nothing_is_computed_without_the_key(live: Live) -> None:
    live.frontend.jobs.clear()
    assert httpx.post(f"{live.url}/v1/completions", json={"prompt": "hello"}).status_code == 401
    assert live.frontend.jobs == []


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_the_key(live: Live, scheme: str) -> None:
    headers = [(b"authorization", f"{scheme} {KEY}".encode())]
    assert httpx.get(f"{live.url}/v1/models", headers=headers).status_code == 200


def test_openais_client_sends_it() -> None:
    plain = "sk-1234"
    with (
        serving(Text(byte_level_tokenizer()), FakeFrontend(), Settings(api_key=plain)) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key=plain, max_retries=0) as client,
    ):
        assert client.completions.create(model="tiny", prompt="hello").choices[0].text == "hello"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="sk-5678").models.list()


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_probes_need_none(live: Live, path: str) -> None:
    assert httpx.get(live.url + path).status_code == 200


def test_other_protocols_pass() -> None:
    """A lifespan has no headers."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(Guard(app, KEY)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


def test_where_the_key_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIPTYCH_API_KEY", raising=False)
    assert load_cluster(None, {}).api_key is None
    monkeypatch.setenv("DIPTYCH_API_KEY", "from the environment")
    assert load_cluster(None, {}).api_key == "from the environment"
    assert load_cluster(None, {"api_key": "a flag"}).api_key == "a flag"


def test_an_empty_key_is_a_mistake_and_not_an_open_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIPTYCH_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="empty"):
        load_cluster(None, {"api_key": ""})
