"""`python -m diptych.bench` against a server that says its prompt again."""

import argparse
import json
from pathlib import Path

import pytest
from serve_doubles import byte_level_tokenizer, serving

from diptych.bench.command import add_flags, parse_range, run
from diptych.errors import ConfigError
from diptych.serve.text import Text

SMALL = ["--seconds", "0.3", "--rate", "20", "--chat-prompt", "9-12", "--chat-answer", "4-6", "--slo", "ttft=5"]


def called(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(flags)


def test_an_open_loop(tmp_path: Path) -> None:
    with serving(Text(byte_level_tokenizer())) as live:
        assert run(called(live.url, *SMALL, "--out", str(tmp_path / "out.json"))) == 0
        assert {len(job.tokens) for job in live.frontend.jobs} <= {9, 10, 11, 12}
    found = json.loads((tmp_path / "out.json").read_text())["summaries"]["chat"]
    assert found["num"] == found["num_good"] > 0 and found["errors"] == {}


def test_a_closed_loop_goes_on_when_the_first_load_is_through() -> None:
    with serving(Text(byte_level_tokenizer())) as live:
        assert run(called(f"{live.url}/v1", *SMALL, "--rate", "4", "--concurrency", "2")) == 0
        assert len(live.frontend.jobs) > 4


def test_failed_requests_fail_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Text(byte_level_tokenizer())) as live:
        assert run(called(live.url, *SMALL, "--model", "another")) == 1
    assert "404: the model 'another' does not exist" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("flags", [["https://127.0.0.1"], ["http://127.0.0.1:1", "--rate", "0"]])
def test_what_cannot_be_done_is_said(flags: list[str]) -> None:
    with pytest.raises(ConfigError):
        run(called(*flags))


def test_ranges() -> None:
    assert parse_range("64-200") == (64, 200) and parse_range("7") == (7, 7)
    for text in ("", "0-4", "9-3", "a-b"):
        with pytest.raises(ValueError):
            parse_range(text)
