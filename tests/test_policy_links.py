"""Which pairs can hand KV over, as far as the workers say."""

from dataclasses import dataclass

from diptych.policy.links import Links


@dataclass(frozen=True)
class Named:
    name: str


P, Q, D, E = map(Named, "pqde")


def first(able: list[Named], _: Named | None) -> Named | None:
    return able[0] if able else None


def test_a_connection_stands_until_either_side_says_that_it_does_not() -> None:
    links = Links()
    assert links.stand("p", "d")
    links.down("p", "d")
    links.down("d", "p")
    assert not links.stand("p", "d") and not links.stand("d", "p") and links.stand("p", "e")
    links.up("p", "d")
    assert not links.stand("p", "d"), "the other side still says so"
    links.up("d", "p")
    assert links.stand("p", "d")


def test_who_is_gone_takes_along_what_was_said_of_it() -> None:
    links = Links()
    links.down("p", "d")
    links.down("d", "q")
    links.forget("d")
    assert links.stand("p", "d") and links.stand("d", "q")


def test_the_best_pair_is_one_that_is_connected() -> None:
    links = Links()
    assert links.best([P, Q], [D, E], first) == (P, D)
    links.down("d", "p")
    assert links.best([P, Q], [D, E], first) == (Q, D)
    links.down("q", "d")
    assert links.best([P, Q], [D, E], first) == (P, E)
    assert links.best([P, Q], [D, E], first, {("p", "e")}) == (Q, E)
    assert links.best([P, Q], [D], first) is None
