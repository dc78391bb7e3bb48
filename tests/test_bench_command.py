"""`diptych bench` against a server that says its prompt again."""

import json
import re
from pathlib import Path

import pytest
from serve_doubles import byte_level_tokenizer, serving, write_checkpoint

from diptych.bench.command import _warnings
from diptych.bench.report import summarize
from diptych.cli import main
from diptych.serve.api import Settings
from diptych.serve.text import Text

SMALL = ["--seconds", "0.3", "--rate", "20", "--prompt", "9-12", "--output", "4-6", "--slo", "ttft=5"]
TRACE = Path(__file__).parent / "traces" / "mooncake.jsonl"


def test_an_open_loop(tmp_path: Path) -> None:
    files = ["--out", str(tmp_path / "out.json"), "--records", str(tmp_path / "records.jsonl")]
    with serving(Text(byte_level_tokenizer())) as live:
        assert main(["bench", live.url, *SMALL, *files]) == 0
        probe, *jobs = live.frontend.jobs
        assert len(probe.tokens) == 4 and {len(job.tokens) for job in jobs} <= {9, 10, 11, 12}
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["about"]["model"] == "tiny"
    assert found["summaries"]["all"]["num"] == found["summaries"]["all"]["num_good"] == len(jobs) > 0
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert len(lines) == len(jobs) and all(line["num_tokens"] == line["max_tokens"] for line in lines)
    assert [line["due_s"] for line in lines] == sorted(line["due_s"] for line in lines)


def test_a_closed_loop_heeds_no_rate() -> None:
    with serving(Text(byte_level_tokenizer())) as live:
        assert main(["bench", f"{live.url}/v1", *SMALL, "--rate", "0.1", "--concurrency", "2"]) == 0
        assert len(live.frontend.jobs) > 4


def test_a_trace_is_sent_with_its_prefixes() -> None:
    scale = ["--time-scale", "0.01", "--length-scale", "0.125"]
    with serving(Text(byte_level_tokenizer())) as live:
        assert main(["bench", live.url, "--trace", str(TRACE), *scale]) == 0
        one, two, three, _ = (job.tokens for job in live.frontend.jobs[1:])
    assert (len(one), len(two), len(three)) == (162, 138, 88)
    assert one[:128] == two[:128] and one[:64] == three[:64] and one[128:138] != two[128:138]


def test_a_chat_is_asked_in_words(tmp_path: Path) -> None:
    with serving(Text.load(write_checkpoint(tmp_path))) as live:
        assert main(["bench", live.url, *SMALL, "--chat", "--requests", "2"]) == 0
        assert all(job.max_new <= 6 for job in live.frontend.jobs) and len(live.frontend.jobs) == 3


def test_a_key_comes_from_a_flag_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Text(byte_level_tokenizer()), settings=Settings(api_key="sesame")) as live:
        assert main(["bench", live.url, *SMALL]) == 2
        assert main(["bench", live.url, *SMALL, "--api-key", "sesame"]) == 0
        monkeypatch.setenv("DIPTYCH_API_KEY", "sesame")
        assert main(["bench", live.url, *SMALL]) == 0


def test_failed_requests_fail_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Text(byte_level_tokenizer()), max_tokens=12) as live:
        assert main(["bench", live.url, *SMALL]) == 1
    assert re.search(r"\d+ x 400: ", capsys.readouterr().out)


@pytest.mark.parametrize(
    "flags",
    [
        ["ftp://127.0.0.1"],
        ["http://127.0.0.1:1"],
        ["http://127.0.0.1:1", "--rate", "0"],
        ["http://127.0.0.1:1", "--concurrency", "0"],
        ["http://127.0.0.1:1", "--slo", "ttft"],
        ["http://127.0.0.1:1", "--trace", "nowhere.csv"],
        ["http://127.0.0.1:1", "--out", "/nowhere/at/all.json"],
        ["http://127.0.0.1:1", "--records", "/nowhere/at/all.jsonl"],
    ],
)
def test_what_cannot_be_done_is_said(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 2
    assert capsys.readouterr().err.startswith("diptych: ")


def test_a_client_that_lags_says_so() -> None:
    assert not _warnings(summarize([]), busy=0.1)
    assert "busy 95%" in _warnings(summarize([]), busy=0.95)[0]
