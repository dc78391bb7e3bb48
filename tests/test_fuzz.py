"""Each target of `fuzz.py` for a moment; `make fuzz` is the long form. What was found once stays here by name."""

import mmap
import time
from random import Random
from typing import Any

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import ProtocolError
from diptych.policy.messages import Emit
from diptych.serve.wire import CODEC, Extra, Hello, Score, pack_emit, state_of, unpack_emit

CASES = {"codec": 600, "attachments": 300, "http": 250, "hostile_peer": 60, "grammars": 40, "channels": 100}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_what_nobody_should_write_is_read_or_refused(name: str) -> None:
    """Hypothesis picks the chance, so that what fails is made smaller and kept for the next run."""
    with fuzz.target(name) as case:

        @settings(max_examples=CASES.get(name, 300), deadline=None)
        @given(st.integers(0, 1 << 64))
        def hold(seed: int) -> None:
            case(Random(seed))

        hold()


def test_a_name_that_is_no_text_is_malformed() -> None:
    """In a stranger's hello it ended the process that heard it."""
    with pytest.raises(ProtocolError, match="malformed Hello"):
        CODEC.decode(CODEC.encode(Hello("peer", "abcd", 3)).replace(b"abcd", b"\xff\xfe\xff\xff"))


@pytest.mark.parametrize("count", [-1, 1 << 62])
def test_numbers_have_bounds(count: int) -> None:
    with pytest.raises(ProtocolError, match="malformed Emit"):
        CODEC.decode(CODEC.encode(Emit(64, 0, count)))


@pytest.mark.parametrize("extra", [Extra(-1), Extra(0, (Score(1, b"1234", b""),)), Extra(0, vector=b"123")])
def test_numbers_that_do_not_fit_together_are_no_extra(extra: Extra) -> None:
    with pytest.raises(ProtocolError, match="do not fit together"):
        unpack_emit(1, pack_emit(bytes(4), extra))


@pytest.mark.parametrize("said", [b"", b"[]", b"\xff", b'{"running": "x"}', b'{"last_step_s": "x"}', b"{" * 70_000])
def test_a_report_says_numbers(said: bytes) -> None:
    with pytest.raises(ProtocolError):
        state_of(said)
    assert state_of(b'{"running": 2, "more": []}') == {"running": 2, "more": []}


def test_the_long_form_notices_what_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    hoard: list[Any] = []

    def leak(rng: Random) -> None:
        hoard.append(mmap.mmap(-1, 16 << 20))  # not of the heap, which may have room left by others
        hoard[-1].write(bytes(len(hoard[-1])))
        time.sleep(0.05)

    monkeypatch.setitem(fuzz.TARGETS, "leak", lambda: leak)
    monkeypatch.setattr(fuzz, "GROWTH_BYTES", 8 << 20)
    with pytest.raises(AssertionError, match="it grew by"):
        fuzz.run("leak", 0.5, 1)
    assert "cases" in fuzz.run("framing", 0.1, 1)
