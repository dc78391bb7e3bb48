"""The demo model's small world besides notes: questions it can answer, stories, counting.

The training script draws its conversations from here, and tests and demos can draw prompts that
the model knows. Pure standard library; every generator takes a :class:`random.Random`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from diptych.demo.notes import NAMES, words

NAME_OF_MODEL: str = "the Diptych demo model"

UNKNOWN: str = "I only know my notes and a few things about serving language models."
"""Reply to a question from outside the model's world."""


@dataclass(frozen=True)
class Faq:
    """One answer, and the ways to ask for it."""

    answer: str
    questions: tuple[str, ...]


def _topic(subject: str, answer: str, *extra: str) -> Faq:
    """Make the entry that explains ``subject`` (with its article), with the usual phrasings."""
    bare = subject.removeprefix("a ").removeprefix("an ").removeprefix("the ")
    usual = (
        f"What is {subject}?",
        f"What is {subject}",
        f"what is {subject}?",
        f"What is {bare}?",
        f"What's {subject}?",
        f"Explain {subject}.",
        f"Please explain {subject}.",
        f"Can you explain {subject}?",
        f"Tell me about {subject}.",
        f"Describe {subject}.",
        f"What does {bare} mean?",
        f"Define {bare}.",
        f"Explain {bare} in one sentence.",
    )
    return Faq(answer, tuple(dict.fromkeys(usual + extra)))


SMALL_TALK: tuple[Faq, ...] = (
    Faq(
        f"Hello! I am {NAME_OF_MODEL}. Ask me about your notes, about serving, or for a story.",
        ("Hello", "Hello!", "Hello.", "hello", "Hi", "Hi!", "hi", "Hey", "Hey!", "Hi there", "Hi there!")
        + ("Hello there", "Hello there!", "Good morning", "Good morning!", "Good evening!", "Say hello."),
    ),
    Faq(
        f"I am {NAME_OF_MODEL}, a tiny language model that ships with the server. "
        "I can recall notes, tell a story and explain a few things about serving.",
        ("Who are you?", "Who are you", "who are you?", "What are you?", "What is your name?")
        + ("Tell me about yourself.", "Introduce yourself.", "Which model are you?", "Are you a model?")
        + ("Hello, who are you?", "Hi, who are you?", "Hello! Who are you?", "What model is this?"),
    ),
    Faq(
        "I can recall the notes in your message, tell a short story about an animal, "
        "count, and explain words such as prefill and decode.",
        ("What can you do?", "What can you do for me?", "Help", "Help me.", "help", "How can you help me?")
        + ("What do you know?", "What can I ask you?", "Can you help me?"),
    ),
    Faq(
        "I am well, thank you. My cache is warm and my batches are full.",
        ("How are you?", "How are you today?", "how are you?", "Are you well?", "Hello, how are you?"),
    ),
    Faq(
        "You are welcome.",
        ("Thanks", "Thanks!", "Thank you", "Thank you!", "Thank you.", "Thank you very much.", "thanks"),
    ),
    Faq(
        "Goodbye! Come back when you have more tokens.",
        ("Bye", "Bye!", "Goodbye", "Goodbye!", "Good night!", "See you later."),
    ),
    Faq(
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
        ("What are the days of the week?", "List the days of the week.", "Name the days of the week."),
    ),
    Faq(
        "I was trained in less than an hour on a single core.", ("How were you trained?", "Who trained you?")
    ),
)

TOPICS: tuple[Faq, ...] = (
    _topic(
        "prefill",
        "Prefill is the first phase of a request. The model reads the whole prompt at once, "
        "fills the KV cache and produces the first token.",
        "What happens in prefill?",
        "What does prefill do?",
        "What is the prefill phase?",
        "How does prefill work?",
    ),
    _topic(
        "decode",
        "Decode is the second phase of a request. The model produces one token at a time, "
        "and each step reads the KV cache.",
        "What happens in decode?",
        "What does decode do?",
        "What is the decode phase?",
        "What is decoding?",
        "How does decode work?",
    ),
    _topic(
        "a KV cache",
        "A KV cache holds the keys and values of the tokens read so far, "
        "so that the model need not compute them again for each new token.",
        "What is the KV cache?",
        "What is the KV cache for?",
        "Why is there a KV cache?",
        "What does the KV cache do?",
        "Why do we need a KV cache?",
        "How does a KV cache work?",
    ),
    _topic(
        "disaggregated serving",
        "Disaggregated serving runs prefill and decode on separate workers. "
        "The KV cache moves from one to the other, so long prompts do not delay running answers.",
        "What is disaggregation?",
        "What is disaggregated inference?",
        "What is prefill and decode disaggregation?",
        "Why split prefill and decode?",
        "Why separate prefill and decode?",
        "How does disaggregated serving work?",
        "Explain disaggregation.",
    ),
    _topic(
        "Diptych",
        "Diptych is a server for language models that keeps prefill and decode apart. "
        "It comes with a simulator and a planner.",
        "What does Diptych do?",
        "what is diptych?",
        "How does Diptych work?",
    ),
    _topic(
        "TTFT",
        "TTFT is the time to first token. It covers waiting in the queue and prefill.",
        "What is the time to first token?",
        "What is time to first token?",
        "What does TTFT stand for?",
    ),
    _topic(
        "TPOT",
        "TPOT is the time per output token. It shows how fast decode runs once it has begun.",
        "What is the time per output token?",
        "What is inter-token latency?",
        "What does TPOT stand for?",
    ),
    _topic(
        "goodput",
        "Goodput is the rate of requests that meet their latency targets.",
        "How is goodput measured?",
    ),
    _topic(
        "continuous batching",
        "Continuous batching lets requests join and leave the running batch at every step, "
        "so that no slot waits for the longest answer.",
        "What is batching?",
        "Why do servers use batching?",
    ),
    _topic(
        "a KV transfer",
        "A KV transfer sends the KV cache of a prompt from a prefill worker to a decode worker.",
        "How does the KV cache move?",
        "How is the KV cache sent?",
    ),
    _topic(
        "a token",
        "A token is the unit of text that a language model reads and writes, often a word or a part of one.",
        "What are tokens?",
    ),
    _topic(
        "a prefix cache",
        "A prefix cache keeps the KV cache of a shared beginning, so that later prompts can reuse it.",
        "What is prefix caching?",
        "Why is prefix caching useful?",
    ),
    _topic(
        "a language model",
        "A language model predicts the next token from the tokens before it.",
        "What is an LLM?",
        "How does a language model work?",
    ),
    _topic(
        "attention",
        "Attention lets each token look back at earlier tokens and gather what it needs from them.",
        "How does attention work?",
    ),
    _topic("latency", "Latency is the time that a request takes from its start to its end."),
    _topic("throughput", "Throughput is the number of tokens that a server produces in a second."),
    _topic(
        "a scheduler",
        "A scheduler decides which requests run in the next step and which ones wait.",
        "What does the scheduler do?",
    ),
    _topic(
        "a prompt",
        "A prompt is the text that a request gives to the model.",
    ),
    _topic(
        "a GPU",
        "A GPU is a processor that does many small computations at once, which suits language models.",
        "Why do models need a GPU?",
    ),
    Faq(
        "Prefill reads the whole prompt at once and is limited by compute. "
        "Decode writes one token at a time and is limited by memory.",
        (
            "What is the difference between prefill and decode?",
            "How do prefill and decode differ?",
            "Compare prefill and decode.",
            "Explain prefill and decode.",
            "What are prefill and decode?",
            "What is prefill and decode?",
        ),
    ),
)

FAQS: tuple[Faq, ...] = SMALL_TALK + TOPICS
"""Everything the model can answer in fixed words."""

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
