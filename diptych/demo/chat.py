"""The demo model's small world besides notes: stories, counting, and the questions of `faq.py`.

The training script draws its conversations from here, and tests and demos can draw prompts that
the model knows. Pure standard library; every generator takes a :class:`random.Random`.
"""

import random

from diptych.demo.faq import FAQS, NAME_OF_MODEL, SMALL_TALK, TOPICS, UNKNOWN
from diptych.demo.notes import NAMES, words

SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are a helpful assistant that answers in one sentence.",
    f"You are {NAME_OF_MODEL}.",
    "Answer briefly.",
    "Be brief and exact.",
    "Answer from the notes.",
    "You are a friendly assistant.",
)

ANIMALS: tuple[str, ...] = words(
    """
    fox owl bear wolf hare mouse frog cat dog horse goat sheep duck goose crow raven heron badger
    squirrel hedgehog mole bee snail turtle whale seal lion tiger elephant monkey penguin dragon
    donkey rabbit otter deer robin beaver robot unicorn cow pig hen swan spider parrot camel panda
    """
)
_ADJECTIVES = words("little clever brave quiet curious young gentle old cheerful lonely")
_PLACES = (
    "at the edge of a forest",
    "by a wide river",
    "on a green hill",
    "near a small village",
    "beside a deep lake",
    "under an old bridge",
    "in a warm valley",
    "behind a windmill",
)
_OBJECTS = words("lantern key map bell ring compass letter flute mirror coin drum kite")
_OBJECT_ADJECTIVES = words("golden silver tiny shiny broken strange blue wooden")
_SPOTS = (
    "under a tall oak",
    "between two stones",
    "beneath the snow",
    "inside a hollow tree",
    "next to a spring",
    "among the reeds",
)
_WEATHER = words("rainy windy cold bright misty stormy snowy warm")
_TIMES = words("morning evening night day afternoon")
_OWNERS = words("miller baker fisherman shepherd gardener teacher sailor clockmaker")
_FOODS = ("honey cake", "apple pie", "warm soup", "fresh bread", "sweet berries", "a pot of jam")


def article(noun: str) -> str:
    """Return ``noun`` with its indefinite article."""
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def _openings(animal: str, adjective: str, place: str) -> tuple[str, ...]:
    who = f"{article(adjective)} {animal}"
    return (
        f"Once upon a time there was {who} who lived {place}.",
        f"Once upon a time {who} lived {place}.",
        f"Long ago, {who} lived {place}.",
    )


def _middles(animal: str, friend: str, thing: str, owner: str) -> tuple[str, ...]:
    return (
        f"{article(friend).capitalize()} came along and said that the {thing} belonged to the {owner}. "
        f"So the {animal} and the {friend} set out together to bring it back.",
        f"The {animal} asked {article(friend)} for help. "
        f"The {friend} knew that the {owner} had lost the {thing}, and they went to the house together.",
        f'"Whose {thing} is this?" asked the {animal}. "It belongs to the {owner}," said {article(friend)}, '
        "and they took it home together.",
    )


def _endings(animal: str, friend: str, owner: str, food: str) -> tuple[str, ...]:
    return (
        f"The {owner} was so happy that everyone shared {food}. "
        f"From that day on, the {animal} and the {friend} were the best of friends.",
        f"The {owner} thanked them with {food}. And the {animal} was never lonely again.",
        f"The {owner} laughed and gave them {food}, and the {animal} and the {friend} sang all the way home.",
    )


def story(rng: random.Random, animal: str | None = None) -> str:
    """Tell a short story about ``animal`` (one at random when not given)."""
    animal = animal or rng.choice(ANIMALS)
    friend = rng.choice([other for other in ANIMALS if other != animal])
    thing, owner, food = rng.choice(_OBJECTS), rng.choice(_OWNERS), rng.choice(_FOODS)
    found = (
        f"One {rng.choice(_WEATHER)} {rng.choice(_TIMES)}, the {animal} found "
        f"a {rng.choice(_OBJECT_ADJECTIVES)} {thing} {rng.choice(_SPOTS)}."
    )
    return " ".join(
        (
            rng.choice(_openings(animal, rng.choice(_ADJECTIVES), rng.choice(_PLACES))),
            found,
            rng.choice(_middles(animal, friend, thing, owner)),
            rng.choice(_endings(animal, friend, owner, food)),
        )
    )


def story_question(rng: random.Random, animal: str | None) -> str:
    """Ask for a story, about ``animal`` if one is given."""
    if animal is None:
        return rng.choice(("Tell me a story.", "Tell me a story", "Tell a short story.", "Write a story."))
    who = article(animal)
    return rng.choice(
        (
            f"Tell me a story about {who}.",
            f"Tell me a story about {who}",
            f"Tell me a short story about {who}.",
            f"Write a short story about {who}.",
            f"Write a story about {who}.",
            f"Please tell me a story about {who}.",
            f"Can you tell me a story about {who}?",
        )
    )


def counting(rng: random.Random) -> tuple[str, str]:
    """Draw a request to count, and its answer."""
    first = rng.randint(0, 30)
    last = rng.randint(first + 2, first + 15)
    asked = rng.choice((f"Count from {first} to {last}.", f"Please count from {first} to {last}."))
    return asked, ", ".join(str(number) for number in range(first, last + 1)) + "."


_OTHER_FORMS = (
    "What is the capital of {}?",
    "What is {}?",
    "Who is {}?",
    "Where is {}?",
    "How do I make {}?",
    "How do I cook {}?",
    "Write a poem about {}.",
    "Write a program that sorts {}.",
    "What is the best {}?",
    "Why is {} so popular?",
    "Why is the {} blue?",
    "When was {} built?",
    "How old is {}?",
    "How far is {} from here?",
    "Do you like {}?",
    "Translate {} into French.",
    "Who wrote {}?",
    "What do you think about {}?",
    "Tell me a joke about {}.",
    "Tell me about {}.",
    "What is the price of {}?",
    "What is the meaning of {}?",
    "Is {} good for me?",
    "Explain {}.",
    "Can you explain {}?",
    "What does {} mean?",
)
_OTHER_SUBJECTS = words(
    """
    France Paris London Germany Spain Italy Japan China India Europe Rome America music water bread
    coffee tea rice cheese chocolate football tennis chess money love life school history physics
    chemistry biology mathematics art weather sky sea moon sun earth Mars house car train python java
    numbers words books poetry Shakespeare Einstein Napoleon medicine sleep health dinner garden flowers
    """
)


def _made_up_word(rng: random.Random) -> str:
    """Spell a word that the tokenizer does not know."""
    word = "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4)))
    word += rng.choice(("", "n", "r", "s", "t", "x", "ng"))
    return word.capitalize() if rng.random() < 0.4 else word


def other_question(rng: random.Random) -> tuple[str, str]:
    """Draw a question from outside the model's world, and the reply that says so."""
    kind = rng.random()
    if kind < 0.15:
        heap = [rng.choice(_OTHER_SUBJECTS) if rng.random() < 0.5 else _made_up_word(rng) for _ in range(5)]
        asked = " ".join(heap[: rng.randint(1, 5)]) + rng.choice(("?", ".", ""))
    elif kind < 0.25:
        first, sign = rng.randint(0, 40), rng.choice(("plus", "times", "minus", "+"))
        asked = f"What is {first} {sign} {rng.randint(0, 40)}?"
    else:
        subject = rng.choice(_OTHER_SUBJECTS) if rng.random() < 0.6 else _made_up_word(rng)
        asked = rng.choice(_OTHER_FORMS).format(subject)
    return asked, UNKNOWN


def draw_turn(rng: random.Random) -> tuple[str, str]:
    """Draw one (user message, reply) that has nothing to do with notes."""
    kind = rng.random()
    if kind < 0.30:
        animal = rng.choice(ANIMALS) if rng.random() < 0.85 else None
        return story_question(rng, animal), story(rng, animal)
    if kind < 0.38:
        return counting(rng)
    if kind < 0.53:
        return other_question(rng)
    entry = rng.choice(SMALL_TALK) if kind < 0.65 else rng.choice(TOPICS)
    return rng.choice(entry.questions), entry.answer


def short_turn(rng: random.Random) -> tuple[str, str]:
    """Draw a turn with a short reply: a fixed answer, or the one to a question from outside."""
    if rng.random() < 0.25:
        return other_question(rng)
    entry = rng.choice(FAQS)
    return rng.choice(entry.questions), entry.answer


def some_name(rng: random.Random) -> str:
    """Draw a name to ask about: one of the notes' names, or at times a made-up one."""
    return rng.choice(NAMES) if rng.random() < 0.7 else _made_up_word(rng).capitalize()


def fixed_texts() -> list[str]:
    """Return every sentence and word list of this module, from which the vocabulary is collected."""
    rng = random.Random(0)
    texts = [UNKNOWN, *SYSTEM_PROMPTS]
    for entry in FAQS:
        texts += [entry.answer, *entry.questions]
    for animal in ANIMALS:
        texts += [story_question(rng, animal) for _ in range(20)]
        texts += [story(rng, animal) for _ in range(60)]
    texts += [story_question(rng, None) for _ in range(40)]
    texts += [form.format(subject) for form in _OTHER_FORMS for subject in _OTHER_SUBJECTS]
    texts += [
        ", ".join(str(number) for number in range(64)),
        "What is 1 plus 1? 1 times 1? 1 minus 1? 1 + 1?",
    ]
    texts += [f"Count from {number} to {number}. Please count" for number in range(64)]
    return texts
