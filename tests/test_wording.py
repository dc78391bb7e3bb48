"""msgspec's findings in plain words, whatever they are about."""

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from diptych.wording import sentence


class Inner(msgspec.Struct):
    x: int


class Body(msgspec.Struct, forbid_unknown_fields=True):
    n: Annotated[int, Meta(ge=0, le=5)] | None = None
    p: Annotated[float, Meta(gt=0.0, lt=2.5)] | None = None
    bias: dict[int, Annotated[float, Meta(ge=-1.0)]] | None = None
    form: Literal["x", "y"] | None = None
    stop: str | list[str | int] | None = None
    name: Annotated[str, Meta(min_length=1)] | None = None
    either: bool | int | float | None = None
    inner: list[Inner] = []


@pytest.mark.parametrize(
    ("body", "expected", "field"),
    [
        ('{"n": true}', "'n' must be a whole number, not true or false", "n"),
        ('{"n": -1}', "'n' must be at least 0", "n"),
        ('{"n": 6}', "'n' must be at most 5", "n"),
        ('{"p": 0}', "'p' must be more than 0", "p"),
        ('{"p": 2.5}', "'p' must be less than 2.5", "p"),
        ('{"bias": {"w": 1}}', "each key of 'bias' must be a whole number, not a string", "bias"),
        ('{"bias": {"1": "s"}}', "each value of 'bias' must be a number, not a string", "bias"),
        ('{"bias": {"1": -2}}', "each value of 'bias' must be at least -1", "bias"),
        ('{"form": "z"}', "'form' cannot be 'z'", "form"),
        ('{"stop": 5}', "'stop' must be a string or a list, not a whole number", "stop"),
        ('{"stop": ["a", null]}', "'stop[1]' must be a whole number or a string, not null", "stop[1]"),
        ('{"either": "x"}', "'either' must be true or false or a number, not a string", "either"),
        ('{"name": ""}', "'name' is wrong: Expected `str` of length >= 1", "name"),
        ('{"inner": [{}]}', "'inner[0].x' is required", "inner[0].x"),
        ('{"other": 1}', "'other' is not known", "other"),
        ("5", "this must be an object, not a whole number", None),
    ],
)
def test_a_sentence_names_the_field(body: str, expected: str, field: Any) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(body, type=Body)
    assert sentence(caught.value) == (expected, field)
