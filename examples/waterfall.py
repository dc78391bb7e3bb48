"""Ask something, and show where the time went: a bar for each part, until token 1 and from there to token 2.

diptych serve                                      # in another terminal
python examples/waterfall.py [URL]                 # default http://127.0.0.1:8000
"""

import sys
from typing import Any

import httpx

WIDTH = 50


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    body = {"prompt": "The fox ran over the hill, and the owl saw it. " * 40, "max_tokens": 24, "diptych_trace": True}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status().json()
    (record,) = reply["diptych"]["trace"]  # one for each answer; /requests/{id} has them, too
    show("time to the first token", record["ttft"])
    if record["handover"]:
        show("token 1 to token 2", record["handover"])
        moved = record["transfer"]
        print(
            f"{moved['bytes'] / 1e6:.2f} MB of KV from {moved['source']} to {moved['target']} over {moved['lane']}: "
            f"{moved['us'] / 1e3:.1f} ms of reading, {moved['exposed_us'] / 1e3:.1f} ms of waiting for it"
        )
    for stall in record["stalls"]:
        print(f"token {stall['token']} came {stall['us'] / 1e3:.0f} ms after the one before: {stall['cause']}")


def show(title: str, waterfall: dict[str, Any]) -> None:
    """Each part's bar begins where the one before ends."""
    whole = max(waterfall["us"], 1)
    print(f"{title}: {whole / 1e3:.1f} ms")
    begin = 0
    for name, us in waterfall["parts"].items():
        left, right = (round(WIDTH * at / whole) for at in (begin, begin + us))
        bar = " " * left + "█" * (right - left)
        print(f"  {name:<9}{us / 1e3:9.2f} ms  {bar or '▏'}")
        begin += us


if __name__ == "__main__":
    main()
