"""The server that is measured: where it is, how to knock, and what it wants in a request.

Ours or any that speaks OpenAI's API (vLLM, SGLang). Not responsible for the load.
"""

import http.client
import ssl
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import msgspec

from diptych.bench.client import Client, chat_completion, completion
from diptych.errors import ConfigError

ASK_S = 60.0  # how long it may take to say what it serves, or to answer the first request


@dataclass(frozen=True, slots=True)
class Target:
    """One server. `base` is the path before `/v1`. exact: it heeds `ignore_eos`, so that lengths are as asked for."""

    host: str
    port: int
    base: str = ""
    tls: bool = False
    key: str | None = None
    chat: bool = False
    model: str | None = None
    ignore_eos: bool = True

    @property
    def path(self) -> str:
        """What requests are posted to."""
        return f"{self.base}/v1/{'chat/completions' if self.chat else 'completions'}"

    @property
    def fields(self) -> dict[str, Any]:
        """What every request's body says besides; None takes a field away."""
        return {"model": self.model} | ({} if self.ignore_eos else {"ignore_eos": None})

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def client(self) -> Client:
        """Connections to it. Whether lengths hold is shown, and is no error: not every server can."""
        tls = ssl.create_default_context() if self.tls else None
        return Client(self.host, self.port, self.path, tls=tls, headers=self.headers, exact=False)

    def asked(self) -> "Target":
        """The same, once it was asked for its model and tried with one short request. ConfigError where it fails."""
        found = self if self.model else replace(self, model=self._model())
        status, said = found._try()
        if status in (400, 422) and "ignore_eos" in said:
            found = replace(found, ignore_eos=False)
            status, said = found._try()
        if status != 200:
            raise ConfigError(f"the server answers {status} to a short request: {said[:300]}")
        return found

    def _model(self) -> str | None:
        status, said = self._request("GET", f"{self.base}/v1/models")
        try:
            return str(msgspec.json.decode(said)["data"][0]["id"]) if status == 200 else None
        except (msgspec.DecodeError, LookupError, TypeError):
            return None

    def _try(self) -> tuple[int, str]:
        make: Any = chat_completion if self.chat else completion
        body = make("time" if self.chat else [1, 2, 3, 4], 1, **self.fields)
        return self._request("POST", self.path, body)

    def _request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
        kind = http.client.HTTPSConnection if self.tls else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=ASK_S)
        try:
            connection.request(method, path, body, {"content-type": "application/json", **self.headers})
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(f"{self.host}:{self.port} does not answer: {error}") from None
        finally:
            connection.close()


def parse_target(url: str, **settings: Any) -> Target:
    """`http://127.0.0.1:8000`, `https://host/base`, with `/v1` or without. ConfigError for what is no such URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is not a URL like http://127.0.0.1:8000")
    tls = parts.scheme == "https"
    base = parts.path.rstrip("/").removesuffix("/v1")
    return Target(parts.hostname, port or (443 if tls else 80), base, tls, **settings)
