"""Synthetic notes and questions about them, for exact-recall checks of a served model.

A note gives one person one code word, for example ``The code of Mira is amber.``; a prompt is many
such notes followed by a question. Every name and every code word is one token of the demo
tokenizer, so a note is exactly :data:`TOKENS_PER_NOTE` tokens long. Pure standard library.

Typical use, for a chat message of at least 512 prompt tokens::

    rng = random.Random(7)
    notes, pairs = make_notes(rng, min_tokens=512)
    question, answer = rng.choice(pairs)
    content = f"{notes} {question}"     # the user message
    # a correct reply is exactly `answer`, for instance "The code of Mira is amber."
"""

from __future__ import annotations

import random


def words(text: str) -> tuple[str, ...]:
    """Split a word list at white space."""
    return tuple(text.split())


NAMES: tuple[str, ...] = words(
    """
    Ada Adam Agnes Aida Alan Albert Alice Alma Amina Amos Andre Angela Anita Anna Anton April Arthur
    Asha Astrid Aurora Barbara Basil Beatrice Bella Ben Bernard Bertha Bianca Bjorn Boris Brenda Brian
    Bruno Camila Carl Carmen Carol Cecil Celia Chloe Clara Claude Conrad Cora Cyril Daisy Dan Daphne
    David Debra Delia Denis Diana Diego Dina Dora Doris Dylan Edgar Edith Edmund Edwin Elena Elias Ella
    Elmer Elsa Emil Emma Enid Enzo Eric Erika Ernest Esther Ethan Eva Evelyn Fabio Faith Farah Fatima
    Felix Fiona Flora Frank Freya Frida Gail Gareth Gavin Gemma George Gilda Gina Gloria Grace Greta Guido
    Gustav Hana Hanna Harold Harry Hazel Hector Heidi Helen Henry Herman Hilda Hugo Ian Ida Igor Ilse Imran
    Ines Ingrid Irene Iris Irma Isaac Ivan Ivor Jack Jacob Jade James Jana Jane Jasper Jean Jenny Jill Joan
    Joel John Jonas Jorge Joseph Joyce Juan Judith Julia Julian Karen Karim Karl Kate Keith Kevin Kiran
    Klaus Kurt Lana Lara Laura Lena Leo Leon Leroy Lewis Lidia Lilian Linda Lionel Lisa Livia Lorna Louis
    Lucas Lucy Luis Lydia Mabel Magda Malik Marco Maria Mark Martha Martin Mary Matilda Maud Max Maya
    Megan Mercy Mia Michael Mila Milo Mina Mira Miriam Mona Morris Muriel Nadia Nancy Naomi Nasser Nathan
    Neil Nell Nestor Nick Nigel Nina Noah Noel Nora Norman Odette Olaf Olga Oliver Olivia Omar Oscar Otto
    Owen Pablo Pamela Paolo Patrick Paul Paula Pedro Penny Percy Peter Petra Philip Pia Polly Priya Quentin
    Rachel Ralph Ramon Raul Ravi Rebecca Regina Rene Rhoda Rita Robert Robin Roger Roland Rosa Rose
    Rowan Ruben Rudolf Rufus Rupert Ruth Ryan Sabina Sally Samir Samuel Sandra Sara Saul Selma Sergei Sheila
    Sidney Sigrid Silas Simon Sofia Sonia Stella Steven Sven Sylvia Tamara Tanya Tara Tessa Thelma
    Theo Thomas Tilda Tim Tina Tobias Toby Tom Tony Ulla Ulrich Uma Ursula Vera Victor Viola Vivian Wanda
    Walter Wendy Wilma Winston Xavier Yara Yasmin Yolanda Yusuf Yves Zane Zara Zelda Zoe
    """
)
"""People the notes are about; each is one token."""

VALUES: tuple[str, ...] = words(
    """
    acorn agate alder almond aloe amber anchor anvil apple apricot arrow ash aspen aster atlas bamboo banjo
    barley barrel basalt basket beacon beech bell berry birch biscuit blanket blossom bonnet boulder bramble
    brass bread breeze brick bridge bronze brook broom bucket butter button cabin cactus camel candle canoe
    canvas canyon caramel carbon carpet cedar cellar chalk cherry chess chestnut chime cider cinder
    cinnamon clay clover cobalt cocoa comet compass copper coral cork cotton cradle crater crayon cream
    crimson crown crystal cumin curtain cypress daisy denim desert diamond dome drum dune ebony echo
    elm ember emerald engine fabric falcon feather fennel fern fiddle fig filter flannel flask flint flute
    fossil fountain frost galaxy garlic garnet gate ginger glacier glass glove goblet gold granite grape
    gravel guitar hammer harbor harp hatch hazelnut heather helmet hemlock hinge holly honey hornet ice indigo
    ink iron island ivory ivy jacket jasmine jelly jewel jungle juniper kayak kernel kettle kite ladder lagoon
    lake lamp larch lavender lead leaf leather lemon lentil lily lime linen locket lotus lumber magnet mango
    maple marble marigold meadow melon meteor mica milk mint mirror mitten mocha moss mustard nectar needle
    nettle nickel nutmeg oak oat oasis ocean olive onion onyx opal orange orbit orchard orchid otter oven
    oyster paddle paint palm paper parsley pasture peach pearl pebble pecan pencil pepper petal pewter piano
    pillow pine pistachio planet plum pocket pollen pond poplar poppy prairie prism pumpkin puzzle quartz
    quill quilt rabbit radish raft rain ribbon ridge ripple river rocket rope ruby saddle saffron sage
    sail salt sand sapphire satin scarf scarlet shell shovel silk silver slate sleet sparrow spice
    spruce steam steel stone storm straw sugar summit sunset syrup teapot thistle thunder thyme tiger
    timber tin toast topaz torch trumpet tulip tundra tunnel turnip umber valley vanilla velvet violet
    walnut wax wheat whistle willow window wool yarn zinc
    """
)
"""Code words the notes give out; each is one token."""

TOKENS_PER_NOTE: int = 7
"""Length of one note with the demo tokenizer: ``The code of NAME is VALUE .``"""

MAX_NOTES: int = len(NAMES)
"""Most notes one set can have, since a name occurs once in a set."""


def note(name: str, value: str) -> str:
    """Return the note that gives ``name`` the code ``value``."""
    return f"The code of {name} is {value}."


def question(name: str) -> str:
    """Return the question for the code of ``name``."""
    return f"What is the code of {name}?"


def answer(name: str, value: str) -> str:
    """Return the reply expected to :func:`question` when there is a note about ``name``."""
    return note(name, value)


def no_note_answer(name: str) -> str:
    """Return the reply expected to :func:`question` when there is no note about ``name``."""
    return f"I have no note about {name}."


def draw_pairs(rng: random.Random, num_notes: int) -> list[tuple[str, str]]:
    """Draw ``num_notes`` (name, value) pairs, the names distinct, in random order."""
    if not 0 <= num_notes <= MAX_NOTES:
        raise ValueError(f"num_notes must be between 0 and {MAX_NOTES}, not {num_notes}")
    names = rng.sample(NAMES, num_notes)
    if num_notes <= len(VALUES):
        return list(zip(names, rng.sample(VALUES, num_notes), strict=True))
    return [(name, rng.choice(VALUES)) for name in names]


def make_notes(
    rng: random.Random, num_notes: int | None = None, *, min_tokens: int | None = None
) -> tuple[str, list[tuple[str, str]]]:
    """Draw a set of notes and the questions it answers.

    Give either the number of notes or the least number of demo-tokenizer tokens that the notes
    alone should fill. Returns the notes as one paragraph, and one (question, answer) for each note
    in the notes' order. The same state of ``rng`` gives the same notes.
    """
    if (num_notes is None) == (min_tokens is None):
        raise ValueError("give exactly one of num_notes and min_tokens")
    count = num_notes if num_notes is not None else -(-(min_tokens or 0) // TOKENS_PER_NOTE)
    pairs = draw_pairs(rng, count)
    text = " ".join(note(name, value) for name, value in pairs)
    return text, [(question(name), answer(name, value)) for name, value in pairs]


def make_prompt(rng: random.Random, num_notes: int | None = None, *, min_tokens: int | None = None) -> tuple[str, str]:
    """Draw notes and one question about them: (user message, expected reply)."""
    text, pairs = make_notes(rng, num_notes, min_tokens=min_tokens)
    asked, expected = rng.choice(pairs)
    return f"{text} {asked}", expected
