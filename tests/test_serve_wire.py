"""Attachments: what goes in comes out, and what nobody packed is refused."""

import pytest

from diptych.engine.executor import Sampling, Score
from diptych.errors import ProtocolError
from diptych.serve.wire import NO_EXTRA, Extra, Ticket, pack, pack_emit, pack_ids, unpack_emit, unpack_ticket

SCORE = Score(2, pack_ids([5, 7]), b"\0" * 8)


def test_a_ticket_carries_everything_that_sampling_needs() -> None:
    how = Sampling(
        temperature=0.5, min_p=0.1, repetition_penalty=1.2, logit_bias=((3, -1.0),), logprobs=2, stop_ids=(1,)
    )
    ticket = Ticket(pack_ids([1, 2, 3]), 2, how, b"root")
    assert unpack_ticket(pack(ticket)) == ticket


def test_token_ids_alone_cost_four_bytes_each() -> None:
    ids = pack_ids([1, 2, 3])
    assert pack_emit(ids, NO_EXTRA) == ids
    assert unpack_emit(3, ids) == ([1, 2, 3], NO_EXTRA)
    assert unpack_emit(0, b"") == ([], NO_EXTRA)


@pytest.mark.parametrize(
    "extra", [Extra(16), Extra(0, (SCORE,)), Extra(32, (SCORE,), (SCORE, SCORE)), Extra(again=(0, 0))]
)
def test_what_is_known_of_tokens_travels_behind_them(extra: Extra) -> None:
    assert unpack_emit(1, pack_emit(pack_ids([9]), extra)) == ([9], extra)


@pytest.mark.parametrize(("count", "data"), [(2, pack_ids([1])), (1, pack_ids([1]) + b"x"), (1, b"abc"), (0, b"z")])
def test_what_nobody_packed_is_refused(count: int, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_emit(count, data)
