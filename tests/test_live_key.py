"""A cluster with an API key becomes ready, and opens to nobody without it."""

import httpx
from clusters import live


def test_a_cluster_with_a_key() -> None:
    with live(engine="paced", kv_memory="1MiB", mixed=1, api_key="sesame") as supervisor, httpx.Client() as http:
        body = {"prompt": [1, 2, 3], "max_tokens": 2}
        url = f"{supervisor.url}/v1/completions"
        assert http.get(f"{supervisor.url}/health").status_code == 200
        assert http.post(url, json=body).status_code == 401
        assert http.post(url, json=body, headers={"Authorization": "Bearer other"}).status_code == 401
        assert http.post(url, json=body, headers={"Authorization": "Bearer sesame"}).status_code == 200
