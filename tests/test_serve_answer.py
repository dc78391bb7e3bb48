"""Answers: stop strings against a dumb oracle, and how chunks become text, counts and finish reasons."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_doubles import byte_level_tokenizer

from diptych.engine.executor import Sampling, Score
from diptych.errors import DiptychError, Overloaded, Unavailable
from diptych.policy.messages import Reason
from diptych.serve.answer import Answer, StopStrings
from diptych.serve.frontend import Chunk, Job
from diptych.serve.text import Text

TEXT = Text(byte_level_tokenizer())
END = TEXT.tokenizer.token_to_id("<|end|>")


def cut_by_hand(text: str, stops: Sequence[str]) -> str:
    """Let the text grow a character at a time; cut at the first stop string that is there."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


words = st.text(alphabet="abc", min_size=1, max_size=4)


@given(st.lists(st.text(alphabet="abc", max_size=5), max_size=10), st.lists(words, min_size=1, max_size=3))
def test_stop_strings_cut_where_they_first_complete(pieces: list[str], stops: list[str]) -> None:
    filtering, out, stopped = StopStrings(stops), "", ""
    for piece in pieces:
        text, stopped = filtering.push(piece)
        out += text
        assert cut_by_hand("".join(pieces), stops).startswith(out), "more was shown than is part of the answer"
        if stopped:
            break
    assert out + ("" if stopped else filtering.flush()) == cut_by_hand("".join(pieces), stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    filtering = StopStrings(["STOP"])
    assert filtering.push("go S") == ("go ", "")
    assert filtering.push("T") == ("", "")
    assert filtering.push("ay") == ("STay", "")
    assert filtering.push(" ST") == (" ", "")
    assert filtering.push("OP here") == ("", "STOP")


def answer(stops: Sequence[str] = (), **sampling: int) -> Answer:
    return Answer(TEXT, Job([1], 100, Sampling(stop_ids=(END,), **sampling)), stops)


def test_an_answer_that_ends_by_itself() -> None:
    made = answer()
    assert made.feed(Chunk(TEXT.encode("hello"))) == "hello"
    assert made.finish is None
    assert made.feed(Chunk([END], Reason.STOP, cached=5)) == ""
    assert (made.finish, made.ended, made.cached) == ("stop", True, 5)
    assert made.num_tokens == len(TEXT.encode("hello")) + 1, "the stop token was written too"


def test_a_stop_token_that_is_a_word_is_not_shown() -> None:
    word = TEXT.encode("q")[0]
    made = Answer(TEXT, Job([1], 100, Sampling(stop_ids=(word,))))
    assert made.feed(Chunk([*TEXT.encode("ab"), word], Reason.STOP)) == "ab"
    assert made.finish == "stop"


def test_what_ended_an_answer_is_said_and_shown_where_that_is_wanted() -> None:
    text = Text(byte_level_tokenizer(), stop_ids=(END,))
    word = text.encode("q")[0]
    job = Job([1], 100, Sampling(stop_ids=(END, word)))
    for with_stop, ends, chunk, expected, why in [
        (False, ("ll",), Chunk(text.encode("hello")), "he", "ll"),
        (True, ("ll",), Chunk(text.encode("hello")), "hell", "ll"),
        (False, (), Chunk([*text.encode("ab"), word], Reason.STOP), "ab", word),
        (True, (), Chunk([*text.encode("ab"), word], Reason.STOP), "abq", word),
        (True, ("z",), Chunk([*text.encode("ab"), END], Reason.STOP), "ab", None),
        (True, ("z",), Chunk(text.encode("ab"), Reason.LENGTH), "ab", None),
    ]:
        made = Answer(text, job, ends, with_stop=with_stop)
        assert (made.feed(chunk), made.stop_reason) == (expected, why)


def test_a_grammar_at_its_end_ends_an_answer_before_min_tokens() -> None:
    made = Answer(TEXT, Job([1], 100, Sampling(stop_ids=(END,), min_new=9, grammar="g")))
    assert made.feed(Chunk([*TEXT.encode("ab"), END], Reason.STOP)) == "ab"


def test_a_stop_token_is_not_shown_where_the_end_is_told_later() -> None:
    """As it is live: the token comes first, and that it ended the answer with the next message."""
    word = TEXT.encode("q")[0]
    made = Answer(TEXT, Job([1], 100, Sampling(stop_ids=(word,))))
    assert made.feed(Chunk([*TEXT.encode("ab"), word])) == "ab"
    assert made.feed(Chunk([], Reason.STOP)) == ""
    assert made.num_tokens == len(TEXT.encode("ab")) + 1


def test_a_stop_token_before_min_tokens_is_part_of_the_text() -> None:
    word = TEXT.encode("q")[0]
    made = Answer(TEXT, Job([1], 100, Sampling(stop_ids=(word,), min_new=2)))
    assert made.feed(Chunk([word])) == "q"
    assert made.feed(Chunk([word])) == ""


def test_every_token_is_taken_once_with_its_score() -> None:
    made = answer(["x"])
    ids = TEXT.encode("a") + TEXT.encode("x") + TEXT.encode("b")
    scores = tuple(Score(n, b"", b"") for n in range(3))
    assert made.feed(Chunk(ids, scores=scores)) == "a"
    assert (made.taken, made.scores) == (ids[:2], scores[:2])


def test_a_silent_answer_says_nothing() -> None:
    made = Answer(TEXT, Job([1], 1, Sampling()), silent=True)
    assert made.feed(Chunk(TEXT.encode("a"))) == ""
    assert made.feed(Chunk([], Reason.LENGTH)) == ""
    assert (made.num_tokens, made.taken, made.finish) == (0, [], "length")


def test_the_end_by_length_shows_what_was_held_back() -> None:
    made = answer(["STOP"])
    assert made.feed(Chunk(TEXT.encode("hello ST"), Reason.LENGTH)) == "hello ST"
    assert made.finish == "length"


def test_tokens_after_a_stop_string_do_not_count() -> None:
    made = answer(["x"])
    ids = TEXT.encode("a") + TEXT.encode("x") + TEXT.encode("b") * 5
    assert made.feed(Chunk(ids, Reason.LENGTH)) == "a"
    assert (made.finish, made.num_tokens, made.ended) == ("stop", 2, True)


def test_a_stop_string_leaves_the_router_working() -> None:
    made = answer(["x"])
    made.feed(Chunk(TEXT.encode("x")))
    assert (made.finish, made.ended) == ("stop", False)


def test_stop_strings_wait_for_min_tokens() -> None:
    made = answer(["b"], min_new=3)
    ids = [TEXT.encode(letter)[0] for letter in "abcab"]
    assert made.feed(Chunk(ids)) == "abca"
    assert made.num_tokens == 5


@pytest.mark.parametrize(
    ("chunk", "kind", "status"),
    [
        (Chunk([], error=(429, "full")), Overloaded, 429),
        (Chunk([], error=(503, "no worker")), Unavailable, 503),
        (Chunk([], error=(500, "broken")), DiptychError, 500),
        (Chunk([], error=(418, "odd")), DiptychError, 500),
        (Chunk([], Reason.CANCELLED), Unavailable, 503),
    ],
)
def test_what_the_router_says_instead_is_raised(chunk: Chunk, kind: type[DiptychError], status: int) -> None:
    made = answer()
    with pytest.raises(kind) as caught:
        made.feed(chunk)
    assert caught.value.status == status
    assert made.ended
    assert made.finish is None
