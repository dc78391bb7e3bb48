"""What bodies of embeddings and scores come down to, and what is made of vectors."""

import base64
from dataclasses import replace

import numpy as np
import pytest
from serve_doubles import byte_level_tokenizer, card_of

from diptych.errors import BadRequest
from diptych.serve import pooling
from diptych.serve.pooling import EmbeddingCall, ScoreCall
from diptych.serve.text import Text

TEXT = Text(byte_level_tokenizer())
CARD = replace(card_of(TEXT, max_tokens=64), width=8)
CROSS_ENCODER = replace(CARD, task="classify", labels=("LABEL_0",))
NAMES = ("text_1", "text_2")
VECTOR = np.array([3.0, 4.0, 12.0], np.float32)


def test_a_vector_is_cut_and_then_made_of_length_one() -> None:
    assert pooling.shaped(VECTOR).tolist() == pytest.approx([3 / 13, 4 / 13, 12 / 13])
    assert pooling.shaped(VECTOR, 2).tolist() == pytest.approx([0.6, 0.8])
    assert pooling.shaped(VECTOR, 2, normalize=False).tolist() == [3.0, 4.0]
    assert pooling.shaped(np.zeros(3, np.float32)).tolist() == [0.0] * 3


def test_base64_is_little_endian_float32() -> None:
    coded = pooling.encoded(VECTOR, "base64")
    assert isinstance(coded, str) and np.frombuffer(base64.b64decode(coded), "<f4").tolist() == VECTOR.tolist()
    assert pooling.encoded(VECTOR, None) == pooling.encoded(VECTOR, "float") == [3.0, 4.0, 12.0]


def test_one_logit_goes_through_the_logistic_function_and_several_through_softmax() -> None:
    assert pooling.probabilities(np.array([0.0], np.float32)).tolist() == [0.5]
    assert pooling.probabilities(np.array([2.0], np.float32))[0] == pytest.approx(1 / (1 + np.exp(-2.0)))
    assert pooling.probabilities(np.array([-1e4], np.float32)).tolist() == [0.0]
    assert pooling.probabilities(np.array([1e4, 1e4], np.float32)).tolist() == [0.5, 0.5]


def test_inputs_are_texts_or_ids_one_or_several() -> None:
    hello = TEXT.encode("hello")
    for inputs, prompts in (
        ("hello", [hello]),
        (["hello", "world"], [hello, TEXT.encode("world")]),
        (hello, [hello]),
        ([hello, [5]], [hello, [5]]),
    ):
        assert pooling.encode(inputs, True, TEXT, CARD) == prompts  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ("", "must not be empty"),
        ([], "must not be empty"),
        (["a", ""], "must not be empty"),
        ([[]], "must not be empty"),
        (["a", 5], "must not mix"),
        ([99999], "token ids must be from 0"),
        ("a " * 100, "context is 64 tokens"),
        ("a" * 10**6, "characters"),
        (["a"] * 2049, "at most 2048"),
    ],
)
def test_inputs_that_cannot_be(inputs: object, why: str) -> None:
    with pytest.raises(BadRequest, match=why) as error:
        pooling.encode(inputs, True, TEXT, CARD)  # type: ignore[arg-type]
    assert error.value.param == "input"


def test_what_a_checkpoint_can_embed() -> None:
    assert pooling.check_embeds(CARD, None, None) == "last"
    assert pooling.check_embeds(replace(CARD, pooling="mean"), None, 8) == "mean"
    assert pooling.check_embeds(replace(CARD, pooling=""), "mean", None) == "mean"
    for card, asked, why in (
        (CROSS_ENCODER, None, "classifies texts"),
        (replace(CARD, pooling=""), None, "not supported"),
        (CARD, 4, "can only be 8"),
        (replace(CARD, matryoshka=()), 9, "have 8"),
        (replace(CARD, matryoshka=(2, 4)), 3, "one of 2, 4, or 8"),
    ):
        with pytest.raises(BadRequest, match=why):
            pooling.check_embeds(card, None, asked)
    assert pooling.check_embeds(replace(CARD, matryoshka=()), None, 3) == "last"
    assert pooling.check_embeds(replace(CARD, matryoshka=(2, 4)), None, 4) == "last"


def test_texts_are_compared_by_the_cosine_of_their_embeddings() -> None:
    compared = pooling.compare(["hello"], ["world", "hello"], TEXT, CARD, NAMES)
    assert compared.prompts == [TEXT.encode(each) for each in ("hello", "world", "hello")], "each text once"
    one, other = np.array([1, 0], np.float32), np.array([3, 3], np.float32)
    assert compared.scores([one, other, one]) == pytest.approx([0.5**0.5, 1.0])
    pairs = pooling.compare(["a", "b"], ["c", "d"], TEXT, CARD, NAMES)
    assert pairs.scores([one, other, other, other]) == pytest.approx([0.5**0.5, 1.0])


def test_a_cross_encoder_reads_each_pair_as_its_tokenizer_joins_it() -> None:
    compared = pooling.compare(["hello"], ["world", "fox"], TEXT, CROSS_ENCODER, NAMES)
    assert compared.prompts == [TEXT.tokenizer.encode("hello", each).ids for each in ("world", "fox")]
    logits = [np.array([value], np.float32) for value in (0.0, -3.0)]
    assert compared.scores(logits) == pytest.approx([0.5, 1 / (1 + np.exp(3.0))])
    assert compared.scores(logits, activate=False) == [0.0, -3.0]


@pytest.mark.parametrize("card", [CARD, CROSS_ENCODER])
def test_pairs_that_cannot_be(card: object) -> None:
    for firsts, seconds, why in (
        ([], ["a"], "'text_1' must not be empty"),
        (["a"], ["b", ""], "'text_2' must not be empty"),
        (["a", "b"], ["c", "d", "e"], "2 and 3 texts"),
        (["a"], ["b"] * 2049, "at most 2048 pairs"),
        (["a"], ["b " * 100], "context is 64 tokens"),
    ):
        with pytest.raises(BadRequest, match=why):
            pooling.compare(firsts, seconds, TEXT, card, NAMES)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="2 labels; a score needs one"):
        pooling.compare(["a"], ["b"], TEXT, replace(CROSS_ENCODER, labels=("bad", "good")), NAMES)


def test_the_sides_of_a_score_have_several_names() -> None:
    for names in (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items")):
        call = ScoreCall(**{names[0]: "a", names[1]: ["b", "c"]})
        assert pooling.sides(call) == (["a"], ["b", "c"], names)
    for call in (ScoreCall(), ScoreCall(text_1="a"), ScoreCall(text_1="a", documents="b")):
        with pytest.raises(BadRequest, match="text_1"):
            pooling.sides(call)


def test_a_mean_lets_nothing_be_found() -> None:
    tokens = list(range(40))
    call = EmbeddingCall(input="x", cache_salt="tenant", priority=3)
    (job,) = pooling.jobs([tokens], "last", call, CARD)
    assert (job.max_new, job.priority, job.sampling.pooling, len(job.hashes)) == (0, 3, "last", 2)
    (other,) = pooling.jobs([tokens], "last", EmbeddingCall(input="x"), CARD)
    assert job.hashes != other.hashes, "a tenant has its own"
    assert [job.hashes for job in pooling.jobs([tokens] * 2, "mean", call, CARD)] == [(), ()]
